"""Two real DeepSpeed ZeRO-3 ranks in Ray actors, compared with plain torch in this process."""

import math
import os
import random
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.served_encoding import ServedEncoding
from actors.trainer_group import TrainerGroup
from rollout.batch import MicroBatch, mini_batches, pad, select
from rollout.config import ClusterConfig, ModelConfig, SamplingConfig, SyncConfig
from rollout.cursor import Cursor
from rollout.errors import CheckpointBroken, InvalidRequest, SyncRefused, TrainerDead
from rollout.loss import importance_weights, policy_loss, selected_logprobs
from rollout.sync.checkpoint_names import checkpoint_specs, split_parameter
from rollout.sync.encoding import TensorPlan
from rollout.trainer_config import LossAggregation, TrainerConfig
from rollout.types import Group, Prompt, Status, Trajectory
from tests.actors.shadow_controller import ShadowController, decoded

pytestmark = pytest.mark.ray
BUCKET_BYTES = 16 * 1024  # smaller than one layer's fused experts, so that these go alone
TEMPERATURE = 0.8
ADAM_EPSILON = 1e-3  # keeps the first AdamW step from amplifying rounding where a gradient is near 0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def trainer_config() -> TrainerConfig:
    return TrainerConfig(
        num_ranks=2,
        lr=1e-2,
        micro_batch_tokens=96,
        loss_aggregation=LossAggregation.SEQUENCE_MEAN,
        distributed_timeout_s=60,
        deepspeed={"optimizer": {"params": {"eps": ADAM_EPSILON}}},
    )


def start_group(model_dir: Path, run_dir: Path, controller, config: TrainerConfig) -> TrainerGroup:
    return TrainerGroup.start(
        ModelConfig(path=str(model_dir)),
        config,
        SamplingConfig(temperature=TEMPERATURE),
        SyncConfig(bucket_bytes=BUCKET_BYTES, timeout_s=20),
        ClusterConfig(),
        run_dir,
        controller,
    )


@pytest.fixture(scope="module")
def plans(model_dir) -> dict[str, TensorPlan]:
    """Everything in float32, as the default engine serves it."""
    return ServedEncoding(dtype="float32", int4=None).plans(model_dir)


@pytest.fixture(scope="module")
def collector(ray_cluster, plans):
    return start_collector(plans)


def start_collector(plans: dict[str, TensorPlan]):
    """Stands where the controller stands: keeps what is published, or refuses a bucket."""
    return ray.remote(ShadowController).options(num_cpus=0, max_concurrency=4).remote(plans)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def group(model_dir, run_dir, collector):
    group = start_group(model_dir, run_dir, collector, trainer_config())
    yield group
    group.stop()


def make_groups(seed: int, num_groups: int = 5, size: int = 4, rewards=None) -> list[Group]:
    """Random trajectories of very different lengths; one in each seed's first group has failed."""
    rng = random.Random(seed)
    groups = []
    for g in range(num_groups):
        prompt = tuple(rng.randrange(128) for _ in range(rng.randrange(3, 9)))
        members = []
        for i in range(size):
            t = Trajectory(group_id=f"g{seed}-{g}", sample_index=i, seed=i, prompt_token_ids=prompt)
            length = rng.randrange(1, 40)
            t.token_ids = [rng.randrange(128) for _ in range(length)]
            t.logprobs = [-rng.random() * 6 for _ in range(length)]
            t.loss_mask = [1] * length
            t.move_to(Status.COMPLETED)
            t.reward = rng.random() if rewards is None else rewards
            members.append(t)
        groups.append(
            Group(group_id=f"g{seed}-{g}", prompt=Prompt(token_ids=prompt, prompt_id=str(g)), trajectories=members)
        )
    if rewards is None:
        groups[0].trajectories[1].fail("reward raised")
    return groups


def published(group: TrainerGroup, collector) -> dict[str, torch.Tensor]:
    """Float32 tensors by checkpoint name, as they arrived."""
    version = max(group.version, ray.get(collector.live_version.remote()) + 1)
    group._version = version  # versions only rise, and several groups publish to one collector
    group.publish()
    plans = ray.get(collector.get_plans.remote())
    return decoded(ray.get(collector.state.remote())[0], plans)


def plain_model(model_dir: Path, weights: dict[str, torch.Tensor]) -> Qwen3MoeForCausalLM:
    model = Qwen3MoeForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        for name, view in split_parameter(key, parameter.data):
            view.copy_(weights[name])
    return model


def set_sampled(model: Qwen3MoeForCausalLM, groups: list[Group], shift: float = 0.0) -> None:
    """Give trajectories the log-probabilities an exact engine would report, plus `shift`."""
    with torch.no_grad():
        for trajectory in (t for g in groups for t in g.trajectories):
            ids = torch.tensor([[*trajectory.prompt_token_ids, *trajectory.token_ids]])
            logprobs = selected_logprobs(model(ids).logits[:, :-1], ids[:, 1:], TEMPERATURE)[0]
            trajectory.logprobs = (logprobs[len(trajectory.prompt_token_ids) - 1 :] + shift).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainStep:
    """What plain torch says of a training step; `ratios` and `clipped` have one entry an update."""

    loss: float
    grad_norm: float
    ratios: list[float]
    clipped: list[int]


def plain_step(model: Qwen3MoeForCausalLM, groups: list[Group], config: TrainerConfig) -> PlainStep:
    """One padded batch an update, torch's AdamW from a fresh state."""

    def logprobs_of(batch: MicroBatch) -> torch.Tensor:
        logits = model(batch.input_ids).logits[:, batch.first_target - 1 : -1]
        return selected_logprobs(logits, batch.targets, TEMPERATURE)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=0.0, eps=ADAM_EPSILON
    )
    max_tokens = SamplingConfig().max_tokens
    batches = [pad(part) for part in mini_batches(select(groups, config, max_tokens).samples, config, max_tokens)]
    with torch.no_grad():
        starts = [logprobs_of(batch) for batch in batches]
    losses, norms, ratios, clipped = [], [], [], []
    for batch, start in zip(batches, starts, strict=True):
        tis = importance_weights(start, batch.sampling_logprobs, config.tis_cap) if config.use_tis else None
        terms = policy_loss(
            logprobs_of(batch),
            start if config.use_tis else batch.sampling_logprobs,
            batch.advantages,
            batch.weights,
            clip_low=0.2,
            clip_high=0.28,
            tis_weights=tis,
        )
        optimizer.zero_grad()
        terms.loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)))
        optimizer.step()
        losses.append(terms.loss.item())
        ratios.append(float(terms.ratio_sum) / int((batch.weights > 0).sum()))
        clipped.append(int(terms.clipped_sum))
    return PlainStep(loss=sum(losses) / len(losses), grad_norm=max(norms), ratios=ratios, clipped=clipped)


def assert_same_weights(model: Qwen3MoeForCausalLM, got: dict[str, torch.Tensor]) -> None:
    for key, parameter in model.named_parameters():
        for name, want in split_parameter(key, parameter.data):
            # An error d of a gradient moves the AdamW step by at most lr · d / epsilon.
            torch.testing.assert_close(got[name], want, rtol=0, atol=1e-5)


def test_step_over_ranks_and_micro_batches_equals_one_plain_torch_step(group, collector, model_dir):
    before = published(group, collector)
    model = plain_model(model_dir, before)
    groups = make_groups(1)
    set_sampled(model, groups[2:])  # two groups are left off-policy
    want = plain_step(model, groups, trainer_config())

    version = group.version
    metrics = group.train_step(groups)
    assert metrics.version == group.version == version + 1
    assert (metrics.num_failed_trajectories, metrics.num_trained_trajectories) == (1, 19)
    assert metrics.ratio_mean == pytest.approx(1.0) and metrics.clip_fraction == 0
    assert metrics.mismatch_kl > 0.1  # the two groups with invented log-probabilities
    # float32 sums in another order: relative error a few hundred times 6e-8.
    assert metrics.loss == pytest.approx(want.loss, abs=2e-5)
    assert metrics.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    after = published(group, collector)
    assert_same_weights(model, after)
    for name in (name for name in after if ".experts." not in name):
        assert not torch.equal(after[name], before[name]), name


def test_exact_sampling_logprobs_give_no_mismatch(group, collector, model_dir):
    model = plain_model(model_dir, published(group, collector))
    groups = make_groups(2)
    set_sampled(model, groups)
    metrics = group.train_step(groups)
    assert metrics.mismatch_kl < 1e-9 and metrics.abs_gap_max < 1e-4
    assert metrics.tis_weight_mean == pytest.approx(1.0, abs=1e-4)


def two_updates_config() -> TrainerConfig:
    return replace(trainer_config(), updates_per_batch=2)


@pytest.fixture(scope="module")
def two_updates_group(model_dir, tmp_path_factory, collector):
    """A group of its own: the comparison needs a fresh optimizer state."""
    group = start_group(model_dir, tmp_path_factory.mktemp("two"), collector, two_updates_config())
    yield group
    group.stop()


def test_two_updates_equal_two_plain_torch_steps_and_the_second_is_clipped(two_updates_group, collector, model_dir):
    group = two_updates_group
    model = plain_model(model_dir, published(group, collector))
    groups = make_groups(20)
    set_sampled(model, groups[2:])
    want = plain_step(model, groups, two_updates_config())
    assert want.ratios[0] == pytest.approx(1.0, abs=1e-5) and abs(want.ratios[1] - 1) > 0.01
    assert want.clipped[0] == 0 and want.clipped[1] > 5

    version = group.version
    metrics = group.train_step(groups[::-1])
    assert metrics.version == group.version == version + 1
    assert metrics.num_trained_trajectories == 19
    assert metrics.clip_fraction * metrics.num_tokens == pytest.approx(sum(want.clipped))
    assert metrics.loss == pytest.approx(want.loss, abs=2e-5)
    assert metrics.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    assert_same_weights(model, published(group, collector))


def reconfigure(group: TrainerGroup, config: TrainerConfig) -> None:
    """Options of the loss, changed in place: a new group would cost seconds."""
    group._config = config
    group._knobs = replace(group._knobs, tis_cap=config.tis_cap if config.use_tis else None)
    ray.get([rank.__ray_call__.remote(lambda self: setattr(self, "_config", config)) for rank in group._ranks])


def test_without_tis_the_ratio_is_to_the_sampling_policy_and_clips_in_one_update(
    two_updates_group, collector, model_dir
):
    group, config = two_updates_group, replace(trainer_config(), use_tis=False)
    reconfigure(group, config)
    model = plain_model(model_dir, published(group, collector))
    groups = make_groups(21)
    set_sampled(model, groups, shift=-0.5)  # a ratio of e^0.5, above 1 + clip_high
    want = plain_step(model, groups, config)
    metrics = group.train_step(groups)
    samples = select(groups, config, SamplingConfig().max_tokens).samples
    num_raised = sum(s.num_trained_tokens for s in samples if s.advantage > 0)
    assert metrics.clip_fraction == pytest.approx(num_raised / metrics.num_tokens) and 0 < metrics.clip_fraction < 1
    assert metrics.ratio_mean == pytest.approx(math.exp(0.5), rel=1e-5)
    assert metrics.tis_weight_mean == 1 and metrics.tis_capped_fraction == 0
    assert metrics.loss == pytest.approx(want.loss, abs=2e-5)
    assert metrics.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    reconfigure(group, two_updates_config())


def test_publication_has_exactly_the_checkpoint_tensors(group, collector, model_dir):
    tensors = published(group, collector)
    _, calls, buckets = ray.get(collector.state.remote())
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: spec.shape for name, spec in checkpoint_specs(model_dir, "float32").items()
    }
    assert calls[0].startswith("begin") and calls[-1] == "commit" and len(calls) > 4
    assert {ref.sender for ref in buckets} == {0, 1}
    assert all(ref.num_bytes <= BUCKET_BYTES for ref in buckets)


def test_refused_publication_leaves_the_group_usable(group, collector):
    ray.get(collector.set_fault.remote((1, 2, "refuse")))
    with pytest.raises(SyncRefused, match=r"bucket 2 of sender 1, .*digest differs"):
        published(group, collector)
    calls = ray.get(collector.state.remote())[1]
    assert "commit" not in calls and "abandon" in calls
    ray.get(collector.set_fault.remote(None))
    assert published(group, collector).keys()
    assert ray.get(collector.state.remote())[1][0] == "begin full"


def test_greedy_equals_plain_transformers(group, collector, model_dir):
    model = plain_model(model_dir, published(group, collector))
    prompts = [(5, 6, 7), (1, 2, 3, 4, 9, 8)]
    for prompt, got in zip(prompts, group.greedy(prompts, 6), strict=True):
        ids = list(prompt)
        for token, gap in zip(got.token_ids, got.gaps, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            assert int(logits.argmax()) == token or gap < 1e-4
            ids.append(token)


def test_nothing_to_train_on_skips_the_step_but_not_the_version(group):
    digest_before, version = group.weights_digest(), group.version
    metrics = group.train_step(make_groups(3, rewards=0.5))
    assert metrics.is_skipped and metrics.num_equal_groups == 5 and metrics.num_tokens == 0
    assert group.version == version + 1 and group.weights_digest() == digest_before


def test_bad_groups_are_refused_and_change_nothing(group):
    groups = make_groups(4)
    groups[2].trajectories[0].logprobs.pop()
    version = group.version
    with pytest.raises(InvalidRequest, match="three equal lengths"):
        group.train_step(groups)
    assert group.version == version


@pytest.fixture(scope="module")
def resumed(group, model_dir, run_dir):
    """A group in new processes that has loaded what `group` saved; `group` was killed after more steps."""
    group.train_step(make_groups(10))
    group.save(Cursor(step=group.version, version=group.version, data_cursor=48))
    group.train_step(make_groups(11))
    group.train_step(make_groups(12))
    expected = group.weights_digest()
    group.stop()  # SIGKILL
    leftover = run_dir / "checkpoints" / "step-000999"  # as a run killed while saving leaves one
    leftover.mkdir()
    (leftover / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"half")
    again = start_group(model_dir, run_dir, None, trainer_config())
    yield again, expected
    again.stop()


def test_damaged_checkpoint_is_refused(resumed, run_dir):
    again, _ = resumed
    tag = (run_dir / "checkpoints" / "latest").read_text().strip()
    victim = next((run_dir / "checkpoints" / tag).glob("*rank_1*optim_states.pt"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-7])
    with pytest.raises(CheckpointBroken, match="bytes"):
        again.load_latest()
    victim.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(CheckpointBroken, match="changed"):
        again.load_latest()
    victim.write_bytes(content)


def test_resumed_run_ends_with_the_same_bits(resumed):
    again, expected = resumed
    cursor = again.load_latest()
    assert cursor is not None and cursor.data_cursor == 48
    assert cursor.version == again.version
    again.train_step(make_groups(11))
    again.train_step(make_groups(12)[::-1])  # the order of arrival does not matter
    assert again.weights_digest() == expected


def test_publish_without_a_controller_says_so(resumed):
    with pytest.raises(InvalidRequest, match="without a controller"):
        resumed[0].publish()


def test_death_of_a_rank_is_an_error_within_seconds(resumed):
    again, _ = resumed
    pid = ray.get(again._ranks[1].__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(TrainerDead, match="rank failed"):
        again.train_step(make_groups(13))
    assert time.monotonic() - begun < 30
