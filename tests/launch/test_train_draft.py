"""Training a draft from the command line on the embedded model, and the draft that is shipped with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from launch import draft_drift, train_draft
from launch.compose import compose
from launch.draft_policies import exchanged_tokens
from launch.draft_report import CHAIN, TREE, measure
from launch.draft_rollouts import exported_rollouts, rollouts, sample_tokens, with_hidden
from launch.draft_target import Target, load_target
from launch.workload import Workload
from rollout.errors import InvalidRequest
from rollout.journal.export import SCHEMA
from rollout.speculation.clover import CloverDraft
from rollout.speculation.clover_config import load_draft
from rollout.speculation.clover_drafter import CloverDrafter
from rollout.speculation.clover_samples import DraftSample
from rollout.speculation.clover_simulation import TreeShape, simulate_draft
from rollout.speculation.decode import speculative_decode

EOS = 2
SMALL = ["prompts=24", "steps=12", "layers=1", "depth=3", "workload.eval_problems=12", "sampling.max_tokens=24"]


@pytest.fixture(scope="module")
def target() -> Target:
    torch.set_num_threads(1)
    return load_target(compose().model)


@pytest.fixture(scope="module")
def shipped(target: Target) -> CloverDraft:
    config, tensors = load_draft("models/tiny/draft")
    target.check(config)
    draft = CloverDraft(config).eval()
    draft.load(tensors)
    return draft


@pytest.fixture(scope="module")
def held_out(target: Target) -> list[DraftSample]:
    config = compose(["workload.eval_problems=24"])
    prompts = Workload(config.workload, config.model, 0).held_out()
    samples = rollouts(
        target.model, prompts, run_seed=5, eos_token_id=EOS, max_tokens=160, temperature=1.0, say=lambda _: None
    )
    return [s for s in samples if len(s.token_ids) > s.num_prompt_tokens + 1]


def test_the_command_trains_saves_and_measures(
    tmp_path: Path, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out.json", tmp_path / "draft"
    assert train_draft.main([*SMALL, f"draft={folder}", f"out={out}"]) == 0
    record = json.loads(out.read_text())
    tree, chain = record["acceptance"][TREE.format(width=4)], record["acceptance"][CHAIN]
    assert tree["num_tokens"] == chain["num_tokens"] > 0
    assert 1.0 <= chain["tokens_per_step"] <= 4.0 and 1.0 <= tree["tokens_per_step"] <= 4.0
    config, tensors = load_draft(folder)
    target.check(config)
    assert (config.num_layers, config.num_steps, config.target_version) == (1, 3, 0)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "prompt look-up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["width=5"], "width: got 5"),
        (["steps=0"], "steps"),
        (["step=3"], "step=3"),
        (["sampling.temperature=0"], "sampling.temperature"),
        (["model.path=nowhere"], "model.path"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_draft.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_shipped_draft_beats_two_and_a_half_tokens_a_step(
    target: Target, shipped: CloverDraft, held_out: list[DraftSample]
) -> None:
    lines = measure(shipped, target.layers, held_out, temperature=1.0, width=4, depth=5, budgets=[])
    tree, chain = lines[TREE.format(width=4)].tokens_per_step, lines[CHAIN].tokens_per_step
    assert tree >= 2.5
    assert tree > chain > max(one.tokens_per_step for name, one in lines.items() if name.startswith("prompt look-up"))


def test_the_shipped_draft_is_small() -> None:
    assert sum(path.stat().st_size for path in Path("models/tiny/draft").iterdir()) <= 1.5 * 2**20


def test_decoding_takes_the_steps_that_were_simulated(
    target: Target, shipped: CloverDraft, held_out: list[DraftSample]
) -> None:
    sample = max((s for s in held_out if len(s.token_ids) < 130), key=lambda s: len(s.token_ids))
    expected = sample.token_ids[sample.num_prompt_tokens :].tolist()
    tokens = speculative_decode(
        CloverDrafter(shipped, target.layers),
        target.model,
        sample.token_ids[: sample.num_prompt_tokens].tolist(),
        max_width=4,
        max_depth=5,
        budget=12,
        max_tokens=len(expected) + 8,  # the last steps draft as deeply as the others
        seed=sample.seed,
        stop_token_ids=[EOS],
    )
    assert [t.token_id for t in tokens] == expected
    shape = TreeShape(max_width=4, depth=5, budget=12)
    (simulated,) = simulate_draft(shipped, [sample], [shape], target=target.layers, temperature=1.0)
    # The first token comes with the prompt; every later pass ends with a token that was not drafted, but for the pass
    # that drafted the end itself.
    passes = sum(not t.is_drafted for t in tokens) - 1 + tokens[-1].is_drafted
    assert passes == simulated.num_steps < simulated.num_tokens / 2


def test_rollouts_do_not_depend_on_what_is_sampled_beside_them(target: Target) -> None:
    config = compose(["workload.eval_problems=6"])
    prompts = Workload(config.workload, config.model, 0).held_out()
    tokens, seeds = [p.token_ids for p in prompts], list(range(6))
    settings = {"eos_token_id": EOS, "max_tokens": 40, "temperature": 1.0}
    together = sample_tokens(target.model, tokens, seeds, **settings)  # type: ignore[arg-type]
    alone = [sample_tokens(target.model, [t], [s], **settings)[0] for t, s in zip(tokens, seeds, strict=True)]  # type: ignore[arg-type]
    assert together == alone
    assert all(EOS not in one[:-1] and len(one) <= 40 for one in together)


def test_trajectories_come_from_an_export(target: Target, tmp_path: Path) -> None:
    empty = {name: [] for name in SCHEMA.names} | {"epoch": 0, "metadata": {}, "status": "completed", "reward": 1.0}
    texts = {name: None for name in ("finish_reason", "error", "checkpoint")}
    rows = [
        empty
        | texts
        | {"run_id": "r", "group_id": f"g{i}", "sample_index": 0, "seed": 9 + i, "prompt_id": "p"}
        | {"prompt_token_ids": [5, 6, 7], "token_ids": tokens, "logprobs": [0.0] * len(tokens)}
        for i, tokens in enumerate([[8, 9, EOS], [EOS], [4, EOS]])
    ]
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    samples = exported_rollouts(target.model, path, limit=5)
    assert [s.token_ids.tolist() for s in samples] == [[5, 6, 7, 8, 9, EOS], [5, 6, 7, 4, EOS]]
    assert [s.seed for s in samples] == [9, 11]
    (again,) = with_hidden(target.model, [((5, 6, 7, 4, EOS), 3, 11)])
    # The same sums in batches of other sizes: float32 rounding of hidden states of size about 1, through 4 layers.
    torch.testing.assert_close(samples[1].hidden, again.hidden, rtol=0, atol=1e-4)
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(InvalidRequest, match="none of two tokens"):
        exported_rollouts(target.model, path, limit=5)


def test_a_draft_follows_policy_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "drift.json"
    arguments = ["updates=1", "held_out=4", "draft_steps=1", "trainer.prompts_per_step=2", "sampling.max_tokens=24"]
    assert draft_drift.main([*arguments, "sampling.n_samples_per_prompt=2", f"out={out}"]) == 0
    record = json.loads(out.read_text())
    assert [drift["policy"] for drift in record["policies"]] == ["grpo", "restyle"]
    for drift in record["policies"]:
        first, last = points = drift["points"]
        assert [p["update"] for p in points] == [0, 1]
        assert first["followed"] == first["frozen"] and first["reward"] is None
        assert 0.0 <= last["reward"] <= 1.0
        assert drift["updated_ratio"] == last["followed"] / first["followed"]
        assert drift["frozen_ratio"] == last["frozen"] / first["frozen"]
    assert "draft frozen" in capsys.readouterr().out


def test_the_other_style_says_the_same_in_as_many_tokens(target: Target) -> None:
    config = compose()
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    exchanged = exchanged_tokens(tokenizer)
    tokens = tokenizer.encode("12 + 3 - 4\n15 - 4\n<answer>11</answer>", add_special_tokens=False)
    assert tokenizer.decode([exchanged.get(t, t) for t in tokens]) == "12+3-4;15-4;<answer>11</answer>"
    assert not set(exchanged) & set(exchanged.values()), "what is in the new style already stays"


def test_an_unknown_policy_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert draft_drift.main(["policies=grpo,guess"]) == 2
    assert "policies" in capsys.readouterr().err
