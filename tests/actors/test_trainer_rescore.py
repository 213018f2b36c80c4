"""Rescoring with one cause toggled: zero where the cause is absent, the hand-computed gap where it is present."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors import trainer_rescore
from actors.trainer_replay import Recorded, RouterReplay
from actors.trainer_rescore import Rescorer, RoundedKv, ServedWeights, round_fp8, round_int8
from kernels.int4 import dequantise, quantise
from rollout.batch import MicroBatch, Sample, pad
from rollout.config import Int4Config
from rollout.errors import InvalidRequest
from rollout.loss import selected_logprobs
from rollout.mismatch import measure, report_of
from rollout.sync.checkpoint_names import checkpoint_specs, split_parameter
from rollout.sync.encoding import TensorPlan, plan_tensors
from rollout.types import Trajectory, VersionSpan

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def model():
    """The tiny model after a step of training: its stored weights would be exact in bfloat16."""
    config = AutoConfig.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.003)
    return model


def plans(dtype: str = "float32", int4: Int4Config | None = None) -> dict[str, TensorPlan]:
    return plan_tensors(checkpoint_specs(TINY, dtype).values(), int4)


def batch() -> MicroBatch:
    """Two rows of unequal length; the first was sampled under versions 3 and 4."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for row, length in enumerate((30, 17)):
        trajectory = Trajectory(group_id="g", sample_index=row, seed=0, prompt_token_ids=(5, 6, 7, 8))
        trajectory.token_ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        trajectory.logprobs, trajectory.loss_mask = [-4.0] * length, [1] * length
        cut = 10 if row == 0 else 0
        spans = (VersionSpan(version=3, start=0, stop=cut), VersionSpan(version=4, start=cut, stop=length))
        trajectory.weight_versions = [span for span in spans if span.stop > span.start]
        samples.append(Sample(trajectory=trajectory, advantage=1.0, weight=0.01))
    return pad(samples)


def score(model):
    def of(batch: MicroBatch) -> torch.Tensor:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, batch.first_target - 1 : -1]
        return selected_logprobs(logits, batch.targets, 1.0)

    return of


def rescorer(model, weights: dict[str, TensorPlan] | None = None, kv_cache_dtype: str = "auto") -> Rescorer:
    served = ServedWeights(model, weights or plans())
    return Rescorer(served, RouterReplay(model), kv_cache_dtype, score(model), CPU)


def recorded(one: MicroBatch, rows: list[bool]) -> Recorded:
    """Experts the routers would not choose, for some of the rows."""
    generator = torch.Generator().manual_seed(2)
    shape = one.input_ids.shape
    is_recorded = torch.arange(shape[1])[None] < (one.lengths[:, None] - 1)
    ids = torch.rand(*shape, 4, 8, generator=generator).topk(2, dim=-1).indices.to(torch.uint8)
    return Recorded(
        ids=ids if any(rows) else None,
        is_recorded=is_recorded & torch.tensor(rows)[:, None],
        num_found=sum(rows),
        num_missing=len(rows) - sum(rows),
    )


@pytest.fixture
def records(monkeypatch):
    """Stands for the object store, which is Ray's; what is fetched is a plain record."""

    def give(rows: list[bool]) -> None:
        monkeypatch.setattr(trainer_rescore, "fetch_recorded", lambda one, device: recorded(one, rows))

    give([False, False])
    return give


def test_absent_causes_give_zero(model, records) -> None:
    sums = rescorer(model).measure(batch(), replays=False, is_captured=False)
    assert sums.weights.k3_sum == sums.kv.k3_sum == 0.0 and not sums.is_captured
    report = report_of([sums], version=3)
    assert (report.weights, report.kv, report.routing, report.staleness) == (0.0, 0.0, None, 0.0)
    assert report.all > 0 and report.num_tokens == 47


def test_all_and_staleness_compare_with_the_sampling_logprobs(model, records) -> None:
    one = batch()
    sums = rescorer(model).measure(one, replays=False, is_captured=False)
    with torch.no_grad():
        expected = measure(score(model)(one), one.sampling_logprobs, one.weights > 0)
    assert sums.all == expected
    assert [(version, part.num_tokens) for version, part in sums.by_version] == [(3, 10), (4, 37)]
    assert 0 < report_of([sums], version=4).staleness < report_of([sums], version=5).staleness


def served_by_hand(model, int4: Int4Config | None, dtype: torch.dtype):
    """A copy of the model that holds the weights as they are served."""
    config = AutoConfig.from_pretrained(TINY)
    other = AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            for name, view in split_parameter(key, parameter.data):
                if int4 is not None and view.ndim == 2 and not any(part in name for part in int4.skip):
                    view.copy_(dequantise(*quantise(view.contiguous(), int4.group_size)))
                else:
                    view.copy_(view.to(dtype))
    return other


@pytest.mark.parametrize(
    ("int4", "dtype"),
    [
        (Int4Config(), "float32"),
        (Int4Config(group_size=32, skip=("lm_head", "embed_tokens", "mlp.gate.", "gate_proj")), "bfloat16"),
        (None, "bfloat16"),
    ],
    ids=["int4", "int4-mixed", "bfloat16"],
)
def test_weights_are_those_the_engine_serves(model, records, int4: Int4Config | None, dtype: str) -> None:
    one = batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sums = rescorer(model, plans(dtype, int4)).measure(one, replays=False, is_captured=False)
    with torch.no_grad():
        served = score(served_by_hand(model, int4, getattr(torch, dtype)))(one)
        expected = measure(score(model)(one), served, one.weights > 0)
    assert sums.weights.k3_sum == pytest.approx(expected.k3_sum, rel=1e-6) and expected.kl > 0
    assert sums.kv.k3_sum == 0.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the trained weights are back"


@torch.no_grad()
def test_weights_come_back_after_a_forward_that_raised(model) -> None:
    served, gate = ServedWeights(model, plans("bfloat16")), model.model.layers[1].mlp.gate
    before = model.lm_head.weight.clone(), gate.weight.clone()
    with pytest.raises(RuntimeError), served.active():
        model.model.layers[2].mlp.experts(torch.zeros(1, 7), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
    assert torch.equal(model.lm_head.weight, before[0]) and torch.equal(gate.weight, before[1])
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert model.model.layers[2].mlp.experts.down_proj.dtype == torch.float32


def test_a_tensor_nobody_serves_is_refused(model) -> None:
    known = plans()
    del known["lm_head.weight"]
    with pytest.raises(InvalidRequest, match="lm_head"):
        ServedWeights(model, known)


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "fp8"])
def test_kv_is_rounded_where_attention_reads_it(model, records, dtype: str) -> None:
    """By hand: hooks on the projections cannot see keys after the rotary embedding, so attention is written out."""
    one, rounding = batch(), {"int8_per_token_head": round_int8, "fp8": round_fp8}[dtype]
    sums = rescorer(model, kv_cache_dtype=dtype).measure(one, replays=False, is_captured=False)

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (rounding(x).repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("written_out", attention)
    with torch.no_grad():
        trained = score(model)(one)
        model.set_attn_implementation("written_out")
        expected = measure(trained, score(model)(one), one.weights > 0)
    # the gap itself carries float32 rounding of two attention kernels, 1e-6 of log-probabilities of about 1e-2
    assert sums.kv.k3_sum == pytest.approx(expected.k3_sum, rel=1e-3) and expected.kl > 0
    assert sums.weights.k3_sum == 0.0


def test_int8_rounding_is_within_half_a_step_of_each_token_and_head() -> None:
    x = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0))
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    assert bool(((round_int8(x) - x).abs() <= step / 2 * (1 + 1e-5)).all())
    assert torch.equal(round_int8(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_only_attention_is_touched() -> None:
    x = torch.randn(3, 4)
    with RoundedKv(lambda t: t * 0):
        assert torch.equal(torch.nn.functional.linear(x, x), x @ x.T)


def test_an_unknown_cache_type_is_refused(model) -> None:
    with pytest.raises(InvalidRequest, match="kv_cache_dtype"):
        rescorer(model, kv_cache_dtype="int4_per_token_head")


def test_routing_compares_with_the_forward_that_uses_the_experts_of_sampling(model, records) -> None:
    one = batch()
    records([True, False])
    found = rescorer(model).measure(one, replays=False, is_captured=True)
    replay = RouterReplay(model)
    with torch.no_grad():
        own = score(model)(one)
        with replay.replaying(recorded(one, [True, False])):
            routed = score(model)(one)
    expected = measure(own[:1], routed[:1], (one.weights > 0)[:1])
    assert found.routing == expected == found.unreplayed and expected.kl > 0
    assert found.is_captured and found.num_choices == (34 - 1) * 4 and found.num_flips > 0


def test_with_replay_nothing_is_left_of_routing_and_other_causes_are_measured_under_it(model, records) -> None:
    one = batch()
    records([True, True])
    served = plans("bfloat16")
    found = rescorer(model, served, "int8_per_token_head").measure(one, replays=True, is_captured=True)
    assert found.routing.k3_sum == 0.0 and found.routing.num_tokens == 47 and found.unreplayed.kl > 0
    replay, weights = RouterReplay(model), ServedWeights(model, served)
    with torch.no_grad(), replay.replaying(recorded(one, [True, True])):
        trained = score(model)(one)
        with weights.active():
            rounded = score(model)(one)
        with RoundedKv(round_int8):
            kv = score(model)(one)
    is_trained = one.weights > 0
    assert found.all == measure(trained, one.sampling_logprobs, is_trained)
    assert found.weights == measure(trained, rounded, is_trained) and found.kv == measure(trained, kv, is_trained)
    assert found.weights.kl > 0 and found.kv.kl > 0


def test_replay_without_records_measures_no_routing(model, records) -> None:
    found = rescorer(model).measure(batch(), replays=True, is_captured=False)
    assert report_of([found], version=4).routing is None
    assert found.num_choices == 0
