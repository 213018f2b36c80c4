"""INT8 KV cache on CPU: the back end alone, step by step against a dense forward, and real engines.

The dense reference quantises keys and values by itself, token by token and head by head.
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

from actors.vllm_plugin.attention import Int8KvBackend, Int8KvImpl, Int8KvMetadataBuilder
from actors.vllm_plugin.platform import ExpertParallelCpuPlatform
from kernels.gumbel_sample import gumbel_noise

REPOSITORY = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 32, 32
SCALE = HEAD_SIZE**-0.5


def spec(dtype: torch.dtype = torch.int8, mode: KVQuantMode = KVQuantMode.INT8_PER_TOKEN_HEAD, head_size=HEAD_SIZE):
    return FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS, head_size=head_size, dtype=dtype, kv_quant_mode=mode
    )


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What INT8 with one scale for each token and head leaves of x [T, H, D]."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)


class Layer(AttentionLayerBase):
    """What the builder looks for in vLLM's configuration: a layer with an implementation."""

    def __init__(self, impl: Int8KvImpl) -> None:
        self.impl = impl

    def get_attn_backend(self):
        return Int8KvBackend

    def get_kv_cache_spec(self, vllm_config):
        return spec()


@dataclass(eq=False)
class Request:
    """Its tokens' queries, keys and values, the blocks it holds, and what has been computed."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    outputs: list[torch.Tensor] = field(default_factory=list)

    def expected(self, quantised: bool = True) -> torch.Tensor:
        """[L, HEADS, HEAD_SIZE] causal attention of all its tokens, in float64."""
        as_stored = rounded if quantised else torch.Tensor.float
        key, value = (as_stored(x).double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (self.key, self.value))
        scores = torch.einsum("qhd,khd->hqk", self.query.double(), key) * SCALE
        scores.masked_fill_(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


class Harness:
    """One layer's cache and back end, driven as vLLM's runner drives them. The cache starts full of NaN scales."""

    def __init__(self, num_blocks: int = 40) -> None:
        content = Int8KvBackend.customize_spec(spec()).state_content_size_bytes
        self.cache = torch.full((num_blocks, KV_HEADS, BLOCK_SIZE, content), -1, dtype=torch.int8)
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.impl = Int8KvImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, kv_cache_dtype="int8_per_token_head")
        config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"layer": Layer(self.impl)}))
        self.builder = Int8KvMetadataBuilder(
            Int8KvBackend.customize_spec(spec()), ["layer"], config, torch.device("cpu")
        )

    def step(self, batch: list[tuple[Request, int]], num_padding: int = 0) -> list[torch.Tensor]:
        """Compute the next `count` tokens of each request; returns their outputs."""
        starts, slots = [0], []
        for request, count in batch:
            end = request.num_computed + count
            while len(request.blocks) * BLOCK_SIZE < end:
                request.blocks.append(self.free.pop())
            for position in range(request.num_computed, end):
                slots.append(request.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            starts.append(starts[-1] + count)
            request.num_computed = end
        query, key, value = (
            torch.cat(
                [getattr(r, name)[r.num_computed - n : r.num_computed] for r, n in batch]
                + [torch.full((num_padding, heads, HEAD_SIZE), torch.nan)]
            )
            for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
        )
        width = max(len(r.blocks) for r, _ in batch) + 1  # vLLM's tables are wider than needed
        table = torch.zeros(len(batch), width, dtype=torch.int32)
        for row, (request, _) in enumerate(batch):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks)
        lengths = torch.tensor([r.num_computed for r, _ in batch], dtype=torch.int32)
        metadata = self.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=torch.tensor(starts, dtype=torch.int32),
                query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
                seq_lens=lengths,
                num_reqs=len(batch),
                num_actual_tokens=starts[-1],
                max_query_len=max(n for _, n in batch),
                max_seq_len=int(lengths.max()),
                block_table_tensor=table,
                slot_mapping=torch.tensor(slots),
            ),
        )
        output = torch.full_like(query, torch.nan)
        self.impl.do_kv_cache_update(None, key, value, self.cache, torch.tensor(slots, dtype=torch.int64))
        self.impl.forward(None, query, key, value, self.cache, metadata, output)
        assert (output[starts[-1] :] == 0).all(), "padding rows must not stay as they were allocated"
        outputs = [output[a:b] for a, b in itertools.pairwise(starts)]
        for (request, _), part in zip(batch, outputs, strict=True):
            request.outputs.append(part)
        return outputs


def request(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Request:
    generator = torch.Generator().manual_seed(seed)
    return Request(
        *(torch.randn(length, heads, HEAD_SIZE, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    )


# Scores: 32 products of size 1 each carry 32 × 2^-24; times |q| SCALE ≈ 1 that is the relative error of a weight.
# Weighted sums of values below 5 add the rounding of at most 300 terms: 5 × (32 + 300) × 2^-24 ≈ 1e-4.
TOLERANCE = 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_steps_agree_with_dense_attention(dtype: torch.dtype) -> None:
    harness = Harness()
    lengths = (1, 31, 32, 33, 64, 130, 257)
    requests = [request(n, seed=n, dtype=dtype) for n in lengths]
    draw = torch.Generator().manual_seed(5)
    while any(r.num_computed < len(r.query) for r in requests):
        batch = []
        for r in requests:
            left = len(r.query) - r.num_computed
            chunk = (0, 1, 1, 7, 64)[int(torch.randint(5, (), generator=draw))]
            if min(left, chunk):
                batch.append((r, min(left, chunk)))
        if batch:
            harness.step(batch, num_padding=len(batch) % 3)
    half_ulp = 2.0**-8 if dtype is torch.bfloat16 else 0.0  # of the output's last rounding, relative
    for r in requests:
        expected = r.expected()
        error = (torch.cat(r.outputs).double() - expected).abs()
        assert (error <= TOLERANCE + half_ulp * expected.abs()).all()
    without = requests[-1].expected(quantised=False)
    assert (requests[-1].expected() - without).abs().max() > 20 * TOLERANCE, "the tolerance tells INT8 from none"


def test_a_preempted_request_finds_its_keys_and_values_again() -> None:
    harness = Harness()
    victim, other = request(100, seed=1), request(120, seed=2)
    first = harness.step([(victim, 90), (other, 1)])[0]
    before = [harness.cache[b].clone() for b in victim.blocks]
    used = list(victim.blocks)
    harness.free += victim.blocks
    victim.blocks, victim.num_computed = [], 0
    harness.step([(other, 64)])  # somebody else writes into its blocks
    again = torch.cat([harness.step([(victim, n)])[0] for n in (1, 40, 49)])
    assert victim.blocks != used
    torch.testing.assert_close(again, first, atol=TOLERANCE, rtol=0)
    restored = harness.step([(victim, 10)])[0]
    torch.testing.assert_close(restored.double(), victim.expected()[90:], atol=TOLERANCE, rtol=0)
    for block, old in list(zip(victim.blocks, before, strict=False))[:2]:  # full blocks
        assert torch.equal(harness.cache[block], old), "the same bytes, however the prompt was cut"


def test_requests_share_the_blocks_of_a_prefix() -> None:
    harness = Harness()
    first, second = request(80, seed=3), request(90, seed=4)
    for name in ("query", "key", "value"):
        getattr(second, name)[:64] = getattr(first, name)[:64]
    harness.step([(first, 80)])
    second.blocks, second.num_computed = first.blocks[:2], 64
    out = harness.step([(request(5, seed=9), 5), (second, 26)])[1]
    torch.testing.assert_close(out.double(), second.expected()[64:], atol=TOLERANCE, rtol=0)


def test_dummy_and_empty_batches() -> None:
    harness = Harness()
    query, kv = torch.randn(3, HEADS, HEAD_SIZE), torch.randn(3, KV_HEADS, HEAD_SIZE)
    output = torch.full_like(query, torch.nan)
    harness.impl.forward(None, query, kv, kv, torch.tensor([]), None, output)
    assert (output == 0).all()
    before = harness.cache.clone()
    harness.impl.do_kv_cache_update(None, kv, kv, harness.cache, torch.empty(0, dtype=torch.int64))
    harness.impl.do_kv_cache_update(None, kv, kv, harness.cache, torch.full((3,), -1))
    assert torch.equal(harness.cache, before)


@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_bytes_of_a_token(head_size: int) -> None:
    """(D + 4) / (D × itemsize) of a plain cache's bytes: INT8 codes and a float32 scale for K, and for V."""
    packed = Int8KvBackend.customize_spec(spec(head_size=head_size))
    for dtype in (torch.float32, torch.bfloat16):
        plain = spec(dtype, KVQuantMode.NONE, head_size)
        assert Int8KvBackend.customize_spec(plain) is plain
        itemsize = dtype.itemsize
        assert packed.page_size_bytes * head_size * itemsize == plain.page_size_bytes * (head_size + 4)
    assert Int8KvBackend.customize_spec(packed) is packed


def test_only_this_cache_type_takes_this_back_end() -> None:
    def chosen(kv_cache_dtype: str) -> str:
        config = AttentionSelectorConfig(
            head_size=HEAD_SIZE, dtype=torch.float32, kv_cache_dtype=kv_cache_dtype, block_size=None
        )
        return ExpertParallelCpuPlatform.get_attn_backend_cls(None, config)

    assert chosen("int8_per_token_head") == f"{Int8KvBackend.__module__}.{Int8KvBackend.__qualname__}"
    for other in ("auto", "fp8"):
        assert chosen(other) == f"{CPUAttentionBackend.__module__}.{CPUAttentionBackend.__qualname__}"


@pytest.mark.parametrize(
    "unsupported",
    [{"sliding_window": 128}, {"alibi_slopes": [1.0]}, {"logits_soft_cap": 30.0}, {"attn_type": "encoder"}],
    ids=lambda option: next(iter(option)),
)
def test_what_it_cannot_do_is_refused(unsupported: dict) -> None:
    with pytest.raises(ValueError, match="INT8 KV cache on CPU"):
        Int8KvImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, kv_cache_dtype="int8_per_token_head", **unsupported)


ENGINE = Path(__file__).with_name("int8_kv_engine.py")
TINY = REPOSITORY / "models" / "tiny"
MAX_FLIP = 0.15  # effect of codes that rounding moved, on one log-probability: three times the largest of 6,144 seen


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What engines with few INT8 blocks sampled, in float32 and in bfloat16."""
    output = tmp_path_factory.mktemp("int8_kv") / "records.json"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(ENGINE), str(output)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def dense_int8_attention(module, query, key, value, attention_mask, scaling, **unused):
    """Hugging Face attention over keys (after rotation) and values as INT8 leaves them; one sequence, causal."""
    groups = query.shape[1] // key.shape[1]
    key, value = (rounded(x).repeat_interleave(groups, 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """The tiny model in float32 as Hugging Face runs it, with INT8 keys and values and with plain ones."""
    AttentionInterface.register("dense_int8", dense_int8_attention)
    AttentionMaskInterface.register("dense_int8", lambda *args, **kwargs: None)
    return {
        kind: AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=attention).eval()
        for kind, attention in (("int8", "dense_int8"), ("plain", "sdpa"))
    }


@torch.no_grad()
def logits(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """[len(tokens), V] logits from which each token was drawn."""
    return model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]


def perturbed(model: torch.nn.Module, prompt: list[int], tokens: list[int], seed: int) -> torch.Tensor:
    """The same with the noise that keyed sampling adds at temperature 1."""
    scores = logits(model, prompt, tokens)
    positions = torch.arange(len(prompt), len(prompt) + len(tokens))
    return scores + gumbel_noise(torch.full_like(positions, seed), positions, scores.shape[1])


@pytest.mark.engine
def test_blocks_for_the_same_bytes(engines: dict) -> None:
    kv_bytes, block_size, num_layers = engines["kv_bytes"], engines["block_size"], 4
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        elements = num_layers * block_size * KV_HEADS * 2 * HEAD_SIZE
        assert engines["num_blocks_auto"][name] == kv_bytes // (elements * dtype.itemsize)
        scales = num_layers * block_size * KV_HEADS * 2 * 4
        assert engines["records"][name]["num_blocks"] == kv_bytes // (elements + scales)


@pytest.mark.engine
def test_engine_agrees_with_a_dense_forward_on_int8_keys_and_values(engines: dict, models: dict) -> None:
    """Two things separate a float32 engine from the dense forward: rounding of float32, and that this rounding now
    and then moves a key or value over the edge between two codes, by 1/127 of the largest in its head. The second
    sets the bound on single log-probabilities; it is rare, which the median and the mean show.
    """
    errors: dict[str, list[torch.Tensor]] = {"int8": [], "plain": []}
    gaps: list[float] = []
    record = engines["records"]["float32"]
    for place, (prompt, sample) in enumerate(zip(engines["prompts"], record["together"], strict=True)):
        tokens = torch.tensor(sample["tokens"])
        for kind, model in models.items():
            expected = torch.log_softmax(logits(model, prompt, sample["tokens"]), -1)
            errors[kind].append((expected.gather(1, tokens[:, None])[:, 0] - torch.tensor(sample["logprobs"])).abs())
        scores = perturbed(models["int8"], prompt, sample["tokens"], 1000 + place)
        best = scores.max(1)
        mine = scores.gather(1, tokens[:, None])[:, 0]
        gaps += (best.values - mine)[best.indices != tokens].tolist()
    error, without = torch.cat(errors["int8"]), torch.cat(errors["plain"])
    print(
        f"INT8 KV, float32: |Δ log p| mean {error.mean():.1e} median {error.median():.1e} max {error.max():.1e}; "
        f"against plain KV mean {without.mean():.1e} max {without.max():.1e}; near ties {gaps}"
    )
    assert error.median() < 2e-4  # as test_keyed_engine.py derives for float32
    assert error.mean() < without.mean() / 50
    assert error.max() < MAX_FLIP
    assert len(gaps) <= len(error) / 1000 and all(gap < 2 * MAX_FLIP for gap in gaps)


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_do_not_depend_on_batch_or_cut(engines: dict, models: dict, dtype: str) -> None:
    """In a batch of 32 with preemptions, in the reverse order, alone, and cut every 64 tokens and resumed.

    In bfloat16 every row of a step is computed alone and rounded, so that nothing may differ. Float32 products
    depend on the shape of the batch in their last bits, so that a near tie may be decided otherwise.
    """
    record = engines["records"][dtype]
    assert record["num_preempted"] > 0
    assert sum(sample["num_cached"] for sample in record["cut"]) > 0, "resumed chunks found their prefix"
    compared = differing = 0
    for other in ("reordered", "alone", "cut"):
        for place, (a, b) in enumerate(zip(record["together"], record[other], strict=False)):
            compared += 1
            if a["tokens"] == b["tokens"]:
                continue
            differing += 1
            first = next(i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if x != y)
            scores = perturbed(models["int8"], engines["prompts"][place], a["tokens"][: first + 1], 1000 + place)[-1]
            gap = float((scores[a["tokens"][first]] - scores[b["tokens"][first]]).abs())
            assert dtype == "float32" and gap < 2 * MAX_FLIP, f"{other} {place}: token {first} differs, gap {gap}"
    print(
        f"INT8 KV, {dtype}: {differing} of {compared} comparisons met a near tie, {record['num_preempted']} preemptions"
    )
    assert differing <= 2
