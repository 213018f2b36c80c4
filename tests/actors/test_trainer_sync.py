"""What two real DeepSpeed ZeRO-3 ranks publish, against whole tensors encoded at once; the receiver is a real shadow.

The small model's sizes make partition boundaries cut rows of plain and of INT4 tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.served_encoding import ServedEncoding
from actors.trainer_group import TrainerGroup
from rollout.config import ClusterConfig, EngineConfig, Int4Config, ModelConfig, SamplingConfig, SyncConfig
from rollout.cursor import Cursor
from rollout.errors import SyncRefused
from rollout.fleet import SyncReport
from rollout.sync.encoding import Encoding, TensorPlan, encode
from rollout.sync.manifest import ALIGNMENT_BYTES
from rollout.sync.segments import SHARED_MEMORY
from tests.actors.shadow_controller import ShadowController
from tests.actors.test_trainer import make_groups, trainer_config

pytestmark = pytest.mark.ray
ENGINE = EngineConfig(dtype="bfloat16", quantization="int4", int4=Int4Config(group_size=32, skip=("mlp.gate.",)))
BUCKET_BYTES = 8 * 1024
SMALL_LR = 1e-6
DEEPSPEED = {"zero_optimization": {"stage3_param_persistence_threshold": 2000}}  # smaller ones stay whole in between


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=129,  # an odd number of groups
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def start_group(model_dir: Path, run_dir: Path, controller, dtype: str = "float32", **sync) -> TrainerGroup:
    return TrainerGroup.start(
        ModelConfig(path=str(model_dir), dtype=dtype),
        replace(trainer_config(), deepspeed=DEEPSPEED),
        SamplingConfig(),
        SyncConfig(bucket_bytes=BUCKET_BYTES, timeout_s=20, **sync),
        ClusterConfig(),
        run_dir,
        controller,
        ENGINE,
    )


def start_controller(model_dir: Path, dtype: str = "float32"):
    plans = ServedEncoding.of(ModelConfig(path=str(model_dir), dtype=dtype), ENGINE).plans(model_dir)
    return ray.remote(ShadowController).options(num_cpus=0, max_concurrency=4).remote(plans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a publication did, and the rows it should have brought."""

    report: SyncReport
    calls: list[str]
    num_entries: int
    want: dict[str, torch.Tensor]


def whole_tensors(group: TrainerGroup) -> dict[str, torch.Tensor]:
    """Every checkpoint tensor, gathered by DeepSpeed."""

    def gather(rank) -> dict[str, torch.Tensor]:
        from actors.trainer_model import gathered, trained_parameters
        from rollout.sync.checkpoint_names import split_parameter

        parameters = dict(trained_parameters(rank._engine.module))
        with gathered(list(parameters.values())):
            return {n: t.clone() for name, p in parameters.items() for n, t in split_parameter(name, p.data)}

    return ray.get([rank.__ray_call__.remote(gather) for rank in group._ranks])[0]


def publish(group: TrainerGroup, controller) -> Published:
    """Publish, and compare every byte that arrived."""
    plans: dict[str, TensorPlan] = ray.get(controller.get_plans.remote())
    want = {name: encode(tensor, plans[name]) for name, tensor in whole_tensors(group).items()}
    group._version = max(group.version, ray.get(controller.live_version.remote()) + 1)
    report = group.publish()
    rows, calls, buckets = ray.get(controller.state.remote())
    assert rows.keys() == want.keys()
    for name, got in rows.items():
        assert torch.equal(got, want[name]), name
    return Published(report=report, calls=calls, num_entries=sum(len(b.entries) for b in buckets), want=want)


@pytest.fixture(scope="module")
def controller(ray_cluster, model_dir):
    return start_controller(model_dir)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def group(model_dir, run_dir, controller) -> Iterator[TrainerGroup]:
    group = start_group(model_dir, run_dir, controller)
    pids = ray.get([rank.__ray_call__.remote(lambda rank: os.getpid()) for rank in group._ranks])
    yield group
    group.stop()
    assert not [path for pid in pids for path in SHARED_MEMORY.glob(f"longroll-{pid}-*")], "segments were left behind"


def set_lr(group: TrainerGroup, lr: float) -> None:
    group._config = replace(group._config, lr=lr)


def test_partitions_cut_rows_so_that_ranks_lend(group, controller):
    publish(group, controller)
    loans, plans = ray.get(
        group._ranks[0].__ray_call__.remote(lambda rank: (rank._source._weights.division.loans, rank._source._plans))
    )
    kinds = group._ranks[0].__ray_call__.remote(lambda rank: {p.ds_persist for p in rank._engine.module.parameters()})
    assert ray.get(kinds) == {True, False}
    lent = {loan.parameter for loan in loans}
    assert lent >= {"lm_head.weight", "model.norm.weight"}
    assert plans["lm_head.weight"].encoding is Encoding.INT4 and plans["model.norm.weight"].encoding is Encoding.PLAIN


def test_first_everything_then_after_real_steps_only_rows_that_changed(group, controller, model_dir):
    first = publish(group, controller)
    plans = ray.get(controller.get_plans.remote())
    bf16_bytes = 2 * sum(plan.numel for plan in plans.values())
    set_lr(group, SMALL_LR)
    before = first
    for seed in range(3):
        metrics = group.train_step(make_groups(30 + seed))
        assert metrics.grad_norm > 0
        now = publish(group, controller)
        assert now.calls[0] == "begin delta"
        changed = {name: (now.want[name] != before.want[name]).any(dim=1) for name in now.want}
        num_changed = sum(int(rows.sum()) for rows in changed.values())
        assert 0 < now.report.num_rows_changed == num_changed < sum(plan.num_rows for plan in plans.values()) / 2
        needed = sum(int(rows.sum()) * plans[name].row_bytes for name, rows in changed.items())
        masks = sum(-(-plan.num_rows // 8) for plan in plans.values())
        padding = now.num_entries * 2 * ALIGNMENT_BYTES  # of a mask and of the rows
        assert needed <= now.report.num_bytes <= needed + masks + padding
        print(
            f"step {seed}: {now.report.num_bytes} bytes, {now.report.num_bytes / bf16_bytes:.4f} of bfloat16, "
            f"{num_changed} of {sum(plan.num_rows for plan in plans.values())} rows"
        )
        before = now


def test_all_of_a_model_takes_little_more_than_a_quarter_of_its_bfloat16_bytes(group, controller):
    ray.get([rank.release.remote() for rank in group._ranks])  # so that nothing is left to compare with
    full = publish(group, controller)
    plans = ray.get(controller.get_plans.remote())
    assert full.calls[0] == "begin full"
    exact = sum(plan.num_bytes for plan in plans.values())
    assert exact <= full.report.num_bytes <= exact + full.num_entries * ALIGNMENT_BYTES
    # Half a byte a weight and two bytes a group, of two bytes a weight in bfloat16.
    int4 = [plan for plan in plans.values() if plan.encoding is Encoding.INT4]
    share = sum(plan.num_bytes for plan in int4) / (2 * sum(plan.numel for plan in int4))
    assert share == pytest.approx((0.5 + 2 / 32) / 2)


def test_a_nan_on_one_rank_is_refused_on_all_and_nothing_is_sent(group, controller):
    publish(group, controller)

    def poison(rank, value: float) -> float:
        partition = rank._engine.module.lm_head.weight.ds_tensor
        old = float(partition[7])
        partition[7] = value
        return old

    old = ray.get(group._ranks[1].__ray_call__.remote(poison, float("nan")))
    live = ray.get(controller.live_version.remote())
    group._version = live + 1
    with pytest.raises(SyncRefused, match=r"lm_head\.weight.*NaN"):
        group.publish()
    assert ray.get(controller.state.remote())[1][-1] == "commit"  # of the one before
    assert ray.get(controller.live_version.remote()) == live
    ray.get(group._ranks[1].__ray_call__.remote(poison, old))
    assert publish(group, controller).calls[0] == "begin delta"


def test_a_segment_cut_short_is_refused_and_the_group_goes_on(group, controller):
    ray.get(controller.set_fault.remote((1, 0, "truncate")))
    set_lr(group, 1e-2)
    group.train_step(make_groups(40))
    group._version = ray.get(controller.live_version.remote()) + 1
    with pytest.raises(SyncRefused, match=r"bucket 0 of sender 1, .*: got \d+ bytes, expected"):
        group.publish()
    ray.get(controller.set_fault.remote(None))
    assert publish(group, controller).calls[0] == "begin full"


def test_a_resumed_trainer_sends_everything(group, controller, model_dir, run_dir):
    group.save(Cursor(step=group.version, version=group.version, data_cursor=1))
    again = start_group(model_dir, run_dir, controller)
    try:
        assert again.load_latest() is not None
        again.train_step(make_groups(50))
        assert publish(again, controller).calls[0] == "begin full"
        late = ray.get(controller.late_rows.remote())
        rows = ray.get(controller.state.remote())[0]
        assert all(torch.equal(late[name], rows[name]) for name in rows)
    finally:
        again.stop()


def test_bfloat16_training_through_the_object_store(ray_cluster, model_dir, tmp_path):
    controller = start_controller(model_dir, "bfloat16")
    group = start_group(model_dir, tmp_path, controller, dtype="bfloat16", transport="object_store")
    try:
        full = publish(group, controller)
        group.train_step(make_groups(60))
        delta = publish(group, controller)
        assert (full.calls[0], delta.calls[0]) == ("begin full", "begin delta")
        assert all(ref.segment is None for ref in ray.get(controller.state.remote())[2])
    finally:
        group.stop()
