"""Weights as plain tensors inside vLLM: the rule for what is INT4, the experts, and engines of random models.

The engines run in a process of their own (quantized_engine.py), each before and after its weights were
overwritten in place by those of another checkpoint. What they sample is compared with Hugging Face models
that hold, in float32, the values the rows stand for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.engine_args import engine_args
from actors.vllm_plugin.moe import packed_moe
from actors.vllm_plugin.quantization import source_modules
from actors.vllm_plugin.slots import PackedStore, is_int4
from kernels.int4.reference import dequantise_reference
from rollout.config import EngineConfig, Int4Config, ModelConfig, SyncConfig
from rollout.errors import InvalidRequest
from rollout.sync.checkpoint_names import checkpoint_specs, split_parameter
from rollout.sync.encoding import Encoding, TensorPlan, encode, int4_tensors, plain_tensor, plan_tensors
from tests.actors.quantized_engine import NUM_TOKENS, PROMPTS

REPOSITORY = Path(__file__).resolve().parents[2]
SKIP = Int4Config().skip
NO_BIAS = "o_proj.bias"
NOTHING_SKIPPED = {"group_size": 32, "skip": ["mlp.gate."]}


def test_a_layer_is_made_of_the_checkpoint_modules_that_were_fused_into_it() -> None:
    attention = "model.layers.0.self_attn"
    assert source_modules(f"{attention}.qkv_proj", {}) == tuple(f"{attention}.{p}_proj" for p in "qkv")
    assert source_modules(f"{attention}.qkv_proj", {"qkv_proj": ["w"]}) == (f"{attention}.w",)
    assert source_modules(f"{attention}.o_proj", {}) == (f"{attention}.o_proj",)
    assert source_modules("lm_head", {}) == ("lm_head",)


def test_what_is_int4_is_the_rule_of_the_plans() -> None:
    int4 = Int4Config(group_size=64)
    assert is_int4(["a.q_proj.weight", "a.k_proj.weight"], 128, torch.bfloat16, int4)
    assert not is_int4(["lm_head.weight"], 100, torch.bfloat16, int4)  # skipped, so no group must fit
    assert not is_int4(["a.q_proj.weight"], 100, torch.float32, None)
    with pytest.raises(InvalidRequest, match="a divisor of its 100 input features"):
        is_int4(["a.q_proj.weight"], 100, torch.bfloat16, int4)
    with pytest.raises(InvalidRequest, match="all or none"):
        is_int4(["a.q_proj.weight", "a.k_proj.weight"], 128, torch.bfloat16, Int4Config(skip=("q_proj",)))
    with pytest.raises(InvalidRequest, match="int8"):
        is_int4(["a.q_proj.weight"], 128, torch.int8, int4)


def arguments(engine: EngineConfig, **options):
    options = {"rank": 0, "rendezvous": None, "on_gpu": False} | options
    return engine_args(ModelConfig(path="models/tiny"), engine, SyncConfig(), **options)


def test_every_engine_asks_for_our_layers() -> None:
    plain = arguments(EngineConfig(num_shards=1))
    assert (plain.quantization, plain.dtype) == ("longroll_plain", "float32")
    int4 = arguments(EngineConfig(num_shards=1, dtype="bfloat16", quantization="int4"))
    assert (int4.quantization, int4.dtype) == ("longroll_int4", "bfloat16")
    assert int4.additional_config["longroll"]["int4"] == {"group_size": 64, "skip": SKIP}
    assert arguments(EngineConfig(num_shards=1, vllm={"quantization": None})).quantization is None


@pytest.mark.parametrize(
    ("options", "on_gpu", "message"),
    [
        ({"dtype": "float16"}, False, "engine.dtype: got float16"),
        ({"dtype": "float32"}, True, "engine.dtype: got float32"),
        ({"dtype": "bfloat16", "tensor_parallel_size": 2}, True, "engine.tensor_parallel_size: got 2"),
        ({"dtype": "bfloat16", "all2all_backend": "deepep_low_latency"}, True, "engine.all2all_backend"),
    ],
)
def test_int4_is_refused_with_what_it_does_not_go_with(options: dict, on_gpu: bool, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        arguments(EngineConfig(num_shards=1, quantization="int4", **options), on_gpu=on_gpu)


class Experts(torch.nn.Module):
    """The parameters of a layer of plain experts."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor) -> None:
        super().__init__()
        for name, weight in (("w13_weight", w13), ("w2_weight", w2)):
            parameter = torch.nn.Parameter(weight.clone(), requires_grad=False)
            parameter.weight_loader = None
            self.register_parameter(name, parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_experts_of_two_ranks_add_up_to_the_mixture(dtype: torch.dtype) -> None:
    """Against float64; a rank adds the experts of its map alone, and a row does not depend on the others."""
    torch.manual_seed(0)
    num_experts, top_k, hidden, width, num_tokens = 8, 3, 64, 96, 21
    w13 = (torch.randn(num_experts, 2 * width, hidden) / hidden**0.5).to(dtype)
    w2 = (torch.randn(num_experts, hidden, width) / width**0.5).to(dtype)
    x = torch.randn(num_tokens, hidden).to(dtype)
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]).int()
    weights = torch.rand(num_tokens, top_k)

    both = torch.einsum("th,enh->ten", x.double(), w13.double())
    terms = torch.einsum("tew,ehw->teh", silu(both[..., :width]) * both[..., width:], w2.double())
    expected = (terms[torch.arange(num_tokens)[:, None], ids.long()] * weights[..., None].double()).sum(1)

    total = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    for mine in ([0, 3, 4, 7], [1, 2, 5, 6]):
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        layer = Experts(w13[mine], w2[mine])
        held = PackedStore(layer, "w13_weight").form, PackedStore(layer, "w2_weight").form
        part = packed_moe(x, *held, weights, ids, expert_map)
        few = packed_moe(x[:5], *held, weights[:5], ids[:5], expert_map)
        assert torch.equal(part[:5], few)
        total += part.double()
    layer = Experts(w13, w2)
    whole = packed_moe(
        x, PackedStore(layer, "w13_weight").form, PackedStore(layer, "w2_weight").form, weights, ids, None
    )
    # Each of a handful of stages rounds once more, relative to the largest value that enters the sum.
    tolerance = 8 * torch.finfo(dtype).eps * float(terms.abs().max()) * top_k
    assert float((total - expected).abs().max()) < tolerance
    assert float((whole.double() - expected).abs().max()) < tolerance


def random_model(directory: Path, seed: int, **options) -> None:
    """Save a small model in bfloat16 whose every tensor is random, norms and biases too.

    Without biases of o_proj, which Hugging Face's model has and vLLM's has not.
    """
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=500,  # vLLM pads it to 512
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        **options,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * (4.0 if "lm_head" in name else 1.0))
            else:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    file = directory / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.endswith(NO_BIAS)}, file, {"format": "pt"})


def dense(rows: dict[str, torch.Tensor], plans: dict[str, TensorPlan]) -> dict[str, torch.Tensor]:
    """The values rows stand for, float32, by checkpoint name."""
    return {
        name: dequantise_reference(*int4_tensors(rows[name], plan))
        if plan.encoding is Encoding.INT4
        else plain_tensor(rows[name], plan).float()
        for name, plan in plans.items()
    }


def reference(directory: str, weights: dict[str, torch.Tensor]) -> Qwen3MoeForCausalLM:
    """Hugging Face's model in float32 with the given weights (checkpoint names)."""
    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for source, view in split_parameter(name, parameter.data):
                view.zero_() if source.endswith(NO_BIAS) else view.copy_(weights[source])
    return model


@torch.no_grad()
def assert_samples_are_those_of(model: Qwen3MoeForCausalLM, samples: list[dict], tolerance: float) -> None:
    """Greedy tokens are the best, but for near ties, and log-probabilities are right."""
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        tokens = sample["tokens"]
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, dim=-1)
        mine = logprobs[torch.arange(NUM_TOKENS), torch.tensor(tokens)]
        assert float((logprobs.amax(-1) - mine).max()) < tolerance
        assert float((mine - torch.tensor(sample["logprobs"])).abs().max()) < tolerance


CASES = {
    "int4": {"dtype": "float32", "int4": {"group_size": 32, "skip": list(SKIP)}},
    "int4, embedding and head too": {"dtype": "float32", "int4": NOTHING_SKIPPED},
    "int4, tied": {"dtype": "float32", "int4": NOTHING_SKIPPED, "tied": True},
    "int4, tied, bfloat16": {"dtype": "bfloat16", "int4": NOTHING_SKIPPED, "tied": True},
    "plain": {"dtype": "float32", "int4": None},
    "plain, tied, bfloat16": {"dtype": "bfloat16", "int4": None, "tied": True},
}
FLOAT32 = [name for name, case in CASES.items() if case["dtype"] == "float32"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """By case: its configuration, and what quantized_engine.py found."""
    directory = tmp_path_factory.mktemp("quantization")
    cases = {}
    for name, case in CASES.items():
        options = dict(attention_bias=True, mlp_only_layers=[1], tie_word_embeddings=case.get("tied", False))
        tied = "tied" if case.get("tied") else "untied"
        for role, seed in (("model", 1), ("other", 2)):
            path = directory / f"{tied}-{role}"
            if not path.exists():
                random_model(path, seed, **options)
            case = {**case, role: str(path)}
        cases[name] = case
    (directory / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("quantized_engine.py")
    done = subprocess.run(
        [sys.executable, str(script), str(directory / "cases.json"), str(directory / "found.pt")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(directory / "found.pt")
    return {name: {**cases[name], **results[name]} for name in cases}


def plans_of(case: dict) -> dict[str, TensorPlan]:
    int4 = None if case["int4"] is None else Int4Config(**case["int4"])
    return plan_tensors(checkpoint_specs(case["model"], case["dtype"]).values(), int4)


@pytest.mark.engine
@pytest.mark.parametrize("name", list(CASES))
def test_the_live_weights_are_all_of_the_checkpoint(found: dict, name: str) -> None:
    case = found[name]
    plans = plans_of(case)
    sources = [source for sources in case["sources"] for source in sources]
    assert sorted(sources) == sorted(plans)
    assert case["differing"] == [], "prepare() of the loaded rows is not what was loaded"
    assert case["moved"] == [], "parameters changed their address"
    stored = load_file(Path(case["model"]) / "model.safetensors")
    for tensor, plan in plans.items():
        assert torch.equal(case["rows"][tensor], encode(stored[tensor].float(), plan)), tensor
    assert "second call" in case["second_take"]


@pytest.mark.engine
@pytest.mark.parametrize("name", FLOAT32)
def test_engines_compute_with_the_values_of_the_rows_before_and_after_the_exchange(found: dict, name: str) -> None:
    """One ulp of a logit of size 32 is 4e-6; float32 sums over 3 layers in other orders stay below 50 of them."""
    case, plans = found[name], plans_of(found[name])
    for rows, samples in (("rows", "before"), ("new_rows", "after")):
        assert_samples_are_those_of(reference(case["model"], dense(case[rows], plans)), case[samples], 2e-4)
    assert [s["tokens"] for s in case["before"]] != [s["tokens"] for s in case["after"]]


@pytest.mark.engine
def test_int4_rows_do_not_depend_on_the_activation_dtype(found: dict) -> None:
    one, other = found["int4, tied"], found["int4, tied, bfloat16"]
    for name, plan in plans_of(one).items():
        if plan.encoding is Encoding.INT4:
            assert torch.equal(one["rows"][name], other["rows"][name])


@pytest.mark.engine
@pytest.mark.parametrize("name", list(CASES))
def test_no_weight_is_held_twice(found: dict, name: str) -> None:
    """Bytes of the parameters: those of the plans, with padding, and what the matmul's form adds.

    On the CPU a bfloat16 form keeps a zero beside each scale, and a tied table both its rows and the form.
    """
    case = found[name]
    expected = 0
    for tensor, plan in plans_of(case).items():
        rows = 512 if plan.shape[0] == 500 else plan.shape[0]
        numel = plan.numel // plan.shape[0] * rows
        if plan.encoding is Encoding.PLAIN:
            expected += numel * (2 if case["dtype"] == "bfloat16" else 4)
            continue
        canonical = numel // 2 + 2 * numel // plan.row_elements
        form = canonical + (2 * numel // plan.row_elements if case["dtype"] == "bfloat16" else 0)
        is_table = "embed_tokens" in tensor
        is_also_form = case.get("tied", False) and case["dtype"] == "bfloat16"
        expected += (canonical + (form if is_also_form else 0)) if is_table else form
    assert case["held_bytes"] == expected
