"""Replay and the mismatch budget on two real ZeRO-3 ranks, compared with plain torch in this process."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.routing_store import put
from actors.trainer_group import TrainerGroup
from actors.trainer_replay import RouterReplay, fetch_recorded
from actors.trainer_rescore import RoundedKv, ServedWeights, round_int8
from rollout.batch import MicroBatch, pad, select
from rollout.config import ClusterConfig, EngineConfig, Int4Config, ModelConfig, SamplingConfig, SyncConfig
from rollout.cursor import Cursor
from rollout.errors import MismatchOverBudget
from rollout.loss import selected_logprobs
from rollout.mismatch import Knobs, measure
from rollout.routing import Routing, pack
from rollout.sync.checkpoint_names import checkpoint_specs
from rollout.sync.encoding import plan_tensors
from rollout.trainer_config import MismatchBudget, MismatchConfig, OverBudget, TrainerConfig
from rollout.types import Chunk, Group, Prompt, SamplingParams, Status, Trajectory, VersionSpan

pytestmark = pytest.mark.ray
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
LAYERS, NUM_EXPERTS, TOP_K = 4, 8, 2
CPU = torch.device("cpu")
MODEL = ModelConfig(path=str(TINY))
ENGINE = EngineConfig(quantization="int4", kv_cache_dtype="int8_per_token_head", enable_return_routed_experts=True)
TRAINER = TrainerConfig(
    num_ranks=2,
    lr=1e-9,  # the model stays what it is, so that every test may compare with the same one
    micro_batch_tokens=192,
    replay_routing=True,
    gradient_checkpointing=True,
    max_grad_norm=1e9,
    distributed_timeout_s=120,
)
SAMPLING = SamplingConfig(temperature=1.0)


def chunk_of(trajectory: Trajectory) -> Chunk:
    return Chunk(
        trajectory_id="t",
        token_ids=trajectory.prompt_token_ids,
        num_prompt_tokens=len(trajectory.prompt_token_ids),
        max_tokens=99,
        seed=0,
        sampling=SamplingParams(),
    )


def packed(trajectory: Trajectory, seed: int) -> bytes:
    """Experts that the routers would not choose."""
    num_rows = len(trajectory.prompt_token_ids) + len(trajectory.token_ids) - 1
    scores = torch.rand(num_rows, LAYERS, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    ids = scores.topk(TOP_K, dim=-1).indices.to(torch.uint8).numpy()
    return pack(Routing(first_token=0, num_experts=NUM_EXPERTS, ids=ids))


def make_groups() -> list[Group]:
    """Three groups of two; every trajectory has recorded routing and spans of versions 0 and 1."""
    draw, groups = random.Random(4), []
    for g in range(3):
        prompt = tuple(draw.randrange(3, 500) for _ in range(draw.randrange(4, 9)))
        members = []
        for i in range(2):
            t = Trajectory(group_id=f"g{g}", sample_index=i, seed=i, prompt_token_ids=prompt)
            length = draw.randrange(8, 30)
            t.token_ids, t.loss_mask = [draw.randrange(3, 500) for _ in range(length)], [1] * length
            t.logprobs = [-5.0] * length
            t.weight_versions = [
                VersionSpan(version=0, start=0, stop=4),
                VersionSpan(version=1, start=4, stop=length),
            ]
            t.routed_experts = (put(packed(t, 10 * g + i), chunk_of(t), length),)
            t.move_to(Status.COMPLETED)
            t.reward = draw.random()
            members.append(t)
        groups.append(Group(group_id=f"g{g}", prompt=Prompt(token_ids=prompt, prompt_id=str(g)), trajectories=members))
    return groups


def batch_of(groups: list[Group]) -> MicroBatch:
    return pad(select(groups, TRAINER, SAMPLING.max_tokens).samples)


@pytest.fixture(scope="module")
def plain():
    config = AutoConfig.from_pretrained(TINY)
    return AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def replay(plain) -> RouterReplay:
    return RouterReplay(plain)


def logprobs_of(model, batch: MicroBatch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, batch.first_target - 1 : -1]
    return selected_logprobs(logits, batch.targets, SAMPLING.temperature)


def set_sampled(logprobs: torch.Tensor, batch: MicroBatch, groups: list[Group]) -> None:
    """Give trajectories these log-probabilities as those they were sampled with."""
    samples = select(groups, TRAINER, SAMPLING.max_tokens).samples
    for row, sample in zip(logprobs, samples, strict=True):
        t = sample.trajectory
        start = len(t.prompt_token_ids) - batch.first_target
        t.logprobs = row[start : start + len(t.token_ids)].tolist()


@pytest.fixture(scope="module")
def group(ray_cluster: None, tmp_path_factory):
    mismatch = MismatchConfig(every_steps=1, num_trajectories=99)
    running = TrainerGroup.start(
        MODEL,
        TRAINER,
        SAMPLING,
        SyncConfig(),
        ClusterConfig(),
        tmp_path_factory.mktemp("run"),
        None,
        ENGINE,
        mismatch,
    )
    yield running
    running.stop()


def same_ranks(group: TrainerGroup, config: TrainerConfig, mismatch: MismatchConfig) -> TrainerGroup:
    """Another driver's view of the ranks, with its own knobs and budget."""
    return TrainerGroup(group._ranks, config, SAMPLING, group._checkpoints, 60.0, False, mismatch)


def test_replayed_steps_and_causes_are_those_of_plain_torch(group: TrainerGroup, plain, replay: RouterReplay) -> None:
    groups = make_groups()
    batch = batch_of(groups)
    recorded = fetch_recorded(batch, CPU)
    assert recorded.num_found == 6
    with replay.replaying(recorded):
        logprobs = logprobs_of(plain, batch)
        plain.zero_grad()
        (-(logprobs * batch.weights * batch.advantages).sum()).backward()
    grad_norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    set_sampled(logprobs.detach(), batch, groups)
    metrics = group.train_step(groups)
    # float32 log-probabilities of other batch shapes: gaps below 1e-4 (tests/actors/test_trainer.py), squared
    assert metrics.mismatch_kl < 1e-8 and metrics.abs_gap_max < 1e-4
    assert (metrics.num_routing_replayed, metrics.num_routing_missing) == (6, 0)
    assert metrics.grad_norm == pytest.approx(float(grad_norm), rel=1e-3)

    report = metrics.mismatch
    assert report is not None and report.num_tokens == metrics.num_tokens
    assert report.all < 1e-8 and report.routing == 0.0
    batch = batch_of(groups)
    is_trained = batch.weights > 0
    served = ServedWeights(plain, plan_tensors(checkpoint_specs(TINY, "float32").values(), Int4Config()))
    with torch.no_grad():
        own = logprobs_of(plain, batch)
        with replay.replaying(recorded), replay.counting() as counts:
            trained = logprobs_of(plain, batch)
        with replay.replaying(recorded), served.active():
            rounded = logprobs_of(plain, batch)
        with replay.replaying(recorded), RoundedKv(round_int8):
            kv = logprobs_of(plain, batch)
    choices, flips = torch.stack(counts).sum(dim=0).tolist()
    # both sides carry float32 rounding of about 1e-6 in log-probabilities that differ by 1e-3 (kv) or more
    assert report.weights == pytest.approx(measure(trained, rounded, is_trained).kl, rel=1e-2) and report.weights > 0
    assert report.kv == pytest.approx(measure(trained, kv, is_trained).kl, rel=1e-2) and report.kv > 0
    assert report.routing_without_replay == pytest.approx(measure(own, trained, is_trained).kl, rel=1e-2)
    assert report.routing_flip_rate == pytest.approx(flips / choices, abs=2 / choices)


def test_lost_routing_is_counted_and_the_step_is_taken(group: TrainerGroup) -> None:
    """Lost by damage or never captured; of an owner that died see test_trainer_replay.py."""
    groups = make_groups()
    damaged, uncaptured = groups[0].trajectories[1], groups[2].trajectories[0]
    length = len(damaged.token_ids)
    damaged.routed_experts = (put(packed(damaged, 1)[:-1] + b"?", chunk_of(damaged), length),)
    uncaptured.routed_experts = ()
    metrics = group.train_step(groups)
    assert (metrics.num_routing_replayed, metrics.num_routing_missing) == (4, 2)
    assert not metrics.is_skipped


def test_staleness_and_tightening(group: TrainerGroup) -> None:
    groups = make_groups()
    budget = MismatchBudget(routing=1e-6)
    tight = same_ranks(
        group,
        replace(TRAINER, replay_routing=False),
        MismatchConfig(every_steps=1, num_trajectories=99, action=OverBudget.TIGHTEN, budget_kl=budget),
    )
    tight._version = 1
    metrics = tight.train_step(groups)
    report = metrics.mismatch
    assert report is not None and report.routing is not None and report.routing > 1e-6
    assert report.routing == report.routing_without_replay
    assert 0 < report.staleness < report.all  # four tokens of each were sampled under version 0
    assert metrics.num_routing_replayed == 6, "replay is on from this very update"
    again = tight.train_step(groups).mismatch
    assert again is not None and again.routing == 0.0 and again.staleness == pytest.approx(again.all)
    tight.save(Cursor(step=3, version=3, data_cursor=7))
    resumed = same_ranks(group, replace(TRAINER, replay_routing=False), MismatchConfig())
    cursor = resumed.load_latest()
    assert cursor is not None and cursor.data_cursor == 7
    assert resumed._knobs == Knobs(tis_cap=2.0, replay_routing=True)


def test_stop_ends_the_step_before_it_changes_anything(group: TrainerGroup) -> None:
    stopping = same_ranks(
        group,
        TRAINER,
        MismatchConfig(every_steps=1, action=OverBudget.STOP, budget_kl=MismatchBudget(weights=1e-9)),
    )
    before = group.weights_digest()
    with pytest.raises(MismatchOverBudget, match="mismatch_kl/weights"):
        stopping.train_step(make_groups())
    assert group.weights_digest() == before and stopping.version == 0


def test_only_due_steps_are_measured(group: TrainerGroup) -> None:
    now_and_then = same_ranks(group, TRAINER, MismatchConfig(every_steps=2, num_trajectories=2))
    reports = [now_and_then.train_step(make_groups()).mismatch for _ in range(3)]
    assert [report is not None for report in reports] == [True, False, True]
    assert reports[0] is not None and 0 < reports[0].num_tokens < 6 * 30
