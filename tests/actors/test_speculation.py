"""Token trees inside real engines: whoever drafts, the tokens are those of plain decoding.

One process runs two engines (float32 with a plain and with an INT8 KV cache), exchanging the drafters while they run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from kernels.gumbel_sample import gumbel_noise, truncation_threshold

pytestmark = pytest.mark.engine

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINE = Path(__file__).with_name("speculation_engine.py")
TINY = REPOSITORY / "models" / "tiny"
CACHES = ("auto", "int8_per_token_head")
# Float32 logits of other batch shapes differ by less than 1e-3. Codes of an INT8 cache that such a difference moved
# change a log-probability by 0.15 at most (test_int8_kv.py), and so a gap between two by twice that.
NEAR_TIE = {"auto": 1e-3, "int8_per_token_head": 0.3}
# |Δ log p| of float32: as test_keyed_engine.py derives.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("speculation") / "records.json"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(ENGINE), str(output)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What INT8 with one scale for each token and head leaves of x [.., L, D]."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)


def int8_attention(module, query, key, value, attention_mask, scaling, **unused):
    groups = query.shape[1] // key.shape[1]
    key, value = (rounded(x).repeat_interleave(groups, 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """The tiny model as Hugging Face runs it, by the KV cache that it stands for."""
    AttentionInterface.register("speculation_int8", int8_attention)
    AttentionMaskInterface.register("speculation_int8", lambda *args, **kwargs: None)
    kinds = zip(CACHES, ("sdpa", "speculation_int8"), strict=True)
    return {
        cache: AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=attention).eval()
        for cache, attention in kinds
    }


@torch.no_grad()
def gap(model: torch.nn.Module, prompt: list[int], a: list[int], b: list[int], seed: int, sampling: dict) -> float:
    """How far apart the target's scores of two continuations lie at their first difference."""
    first = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    logits = model(torch.tensor([[*prompt, *a[:first]]])).logits[0, -1:]
    temperature = torch.tensor([sampling["temperature"]])
    if not temperature:
        return float((logits[0, a[first]] - logits[0, b[first]]).abs())
    scores = logits / temperature
    position = torch.tensor([len(prompt) + first])
    perturbed = scores + gumbel_noise(torch.tensor([seed]), position, logits.shape[1])
    cut = truncation_threshold(
        logits,
        temperature=temperature,
        top_k=torch.tensor([sampling.get("top_k", 0)]),
        top_p=torch.tensor([sampling.get("top_p", 1.0)]),
    )
    distance = float((perturbed[0, a[first]] - perturbed[0, b[first]]).abs())
    if min(float(scores[0, a[first]]), float(scores[0, b[first]])) < float(cut):  # one lies at the edge of the cut
        distance = float((scores[0, [a[first], b[first]]] - cut).abs().min())
    return distance


def num_near_ties(
    model, prompts: list[list[int]], plain: list[dict], drafted: list[dict], sampling: dict, limit: float
):
    """Assert that two lists of samples agree but for near ties; returns their number."""
    found = 0
    for place, (prompt, a, b) in enumerate(zip(prompts, plain, drafted, strict=False)):
        if a["tokens"] != b["tokens"]:
            found += 1
            distance = gap(model, prompt, a["tokens"], b["tokens"], 1000 + place, sampling)
            assert distance < limit, f"sample {place} differs without a near tie: gap {distance}"
    return found


@pytest.mark.parametrize("cache", CACHES)
def test_tokens_are_those_of_plain_decoding(records: dict, models: dict, cache: str) -> None:
    """With random, adversarial, sibling and Clover-2 drafts, and with the truth among decoys.

    Prefills are cut and mixed with trees, requests are preempted, and in the last runs of each sampling every request
    is cut every 32 tokens and finds its prefix.
    """
    compared = differing = 0
    for run in records[cache]["runs"]:
        differing += num_near_ties(
            models[cache], records["prompts"], run["plain"], run["drafted"], run["sampling"], NEAR_TIE[cache]
        )
        compared += len(run["plain"])
        for a, b in zip(run["plain"], run["drafted"], strict=True):
            if cache == "auto" and a["tokens"] == b["tokens"] and "top_p" not in run["sampling"]:
                assert max(abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)) < TOLERANCE
    print(f"speculation, {cache}: {differing} of {compared} requests met a near tie")
    assert differing <= compared / 50, "that many near ties are not chance"


@pytest.mark.parametrize("cache", CACHES)
def test_what_was_exercised(records: dict, cache: str) -> None:
    """The runs above mean something: drafts were accepted, KV was moved, requests were preempted, prefixes found."""
    for run in records[cache]["runs"]:
        tally = run["tally"]
        assert tally["trees"] > 200
        if run["drafter"] == "random":
            continue
        assert tally["accepted"] > tally["trees"] / 8
        assert tally["moved"] > 5
        if "cut" in run["drafter"]:
            assert sum(sample["num_cached"] for sample in run["drafted"]) > 1000
    assert sum(run["tally"]["moved"] for run in records[cache]["runs"]) > 1000
    assert sum(run.get("num_preempted", 0) for run in records[cache]["runs"]) > 10
    first = {
        run["drafter"]: run["tally"]["steps"] for run in records[cache]["runs"] if run["sampling"]["temperature"] == 1
    }
    assert first["truth"] < 0.6 * first["random"], "most of the truth is accepted"


def test_options_that_trees_cannot_have(records: dict, models: dict) -> None:
    """Penalties, bias, masks and min-p beside requests with trees: those have none, and all have their own tokens."""
    for cache in CACHES:
        record = records[cache]["processors"]
        assert record["tally"]["accepted"] > 100
        others = [place for place in range(len(record["plain"])) if place not in record["places"]]
        for place in record["places"]:
            assert record["drafted"][place]["tokens"] == record["plain"][place]["tokens"]
        differing = sum(record["drafted"][place]["tokens"] != record["plain"][place]["tokens"] for place in others)
        assert differing <= 1


@pytest.mark.parametrize("part", ["mask", "move", "positions"])
def test_each_part_is_needed(records: dict, part: str) -> None:
    """Without the mask, the move of KV or the positions by depth tokens are others: the tests above would see it."""
    record = records["auto"]["without"][part]
    differing = sum(a["tokens"] != b["tokens"] for a, b in zip(record["plain"], record["drafted"], strict=True))
    print(f"without {part}: {differing} of {len(record['plain'])} requests differ")
    assert differing > len(record["plain"]) / 2


def test_hidden_states_of_accepted_rows(records: dict) -> None:
    """Drafters are handed the states of what was prefilled and accepted, at their positions.

    Of size 10, after four layers whose sums are made in another order: as TOLERANCE.
    """
    for cache in CACHES:
        record = records[cache]["hidden"]
        assert [s["tokens"] for s in record["plain"]] == [s["tokens"] for s in record["drafted"]]
        num_cached = sum(sample["num_cached"] for sample in record["plain"])
        assert record["compared"] == sum(len(p) for p in records["prompts"][:4]) + 4 * 31 - num_cached
        assert record["largest"] < 10 * TOLERANCE
        num_kept, num_handed = record["kept"]
        assert num_kept == num_handed > 32, "no later step writes to them"
