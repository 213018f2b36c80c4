"""A draft model beside the policy on two real DeepSpeed ZeRO-3 ranks: what it learns, how it travels and resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.served_encoding import ServedEncoding
from actors.trainer_draft import DRAFT_FILE, OnlineDraft, chosen_rows, fitting_draft
from actors.trainer_group import TrainerGroup
from rollout.batch import MicroBatch, plan_updates, select
from rollout.config import ClusterConfig, EngineConfig, ModelConfig, SamplingConfig, SyncConfig
from rollout.cursor import Cursor
from rollout.errors import CheckpointBroken, InvalidRequest, SyncRefused
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_config import DraftConfig, load_draft, save_draft
from rollout.speculation.clover_samples import DraftSample
from rollout.speculation.clover_training import DraftTrainer, DraftTrainingConfig
from rollout.speculation_config import SpeculationConfig
from rollout.trainer_config import DraftUpdateConfig, TrainerConfig
from rollout.types import Group
from tests.actors.shadow_controller import ShadowController, decoded
from tests.actors.test_trainer import TEMPERATURE, make_groups, plain_model, trainer_config

pytestmark = pytest.mark.ray
SHAPE = DraftConfig(
    vocab_size=128,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=64,
    num_steps=3,
)
UPDATE = DraftUpdateConfig(num_steps=3, lr=1e-4, batch_tokens=256)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and in /draft a draft for it."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    save_draft(path / "draft", SHAPE, CloverDraft(SHAPE).state_dict())
    return path


def engine(model_dir: Path) -> EngineConfig:
    directory = str(model_dir / "draft")
    return EngineConfig(
        speculation=SpeculationConfig(enabled=True, sources=("clover2",), draft_model=directory, draft_travels=True)
    )


def config() -> TrainerConfig:
    return replace(trainer_config(), draft=UPDATE)


def start_group(model_dir: Path, run_dir: Path, controller, engine_config: EngineConfig) -> TrainerGroup:
    return TrainerGroup.start(
        ModelConfig(path=str(model_dir)),
        config(),
        SamplingConfig(temperature=TEMPERATURE),
        SyncConfig(bucket_bytes=16 * 1024, timeout_s=20),
        ClusterConfig(),
        run_dir,
        controller,
        engine_config,
    )


@pytest.fixture(scope="module")
def controller(ray_cluster: None, model_dir: Path):
    encoding = ServedEncoding.of(ModelConfig(path=str(model_dir)), engine(model_dir))
    plans = encoding.plans(model_dir) | encoding.draft_plans()
    return ray.remote(ShadowController).options(num_cpus=0, max_concurrency=4).remote(plans)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def group(model_dir: Path, run_dir: Path, controller) -> Iterator[TrainerGroup]:
    group = start_group(model_dir, run_dir, controller, engine(model_dir))
    yield group
    group.stop()


def drafts(group: TrainerGroup) -> list[dict[str, torch.Tensor]]:
    """The copies of the ranks, by the names they travel under."""
    copies = [rank.__ray_call__.remote(lambda self: self._draft.parameters) for rank in group._ranks]
    return [{name: p.detach() for name, p in copy.items()} for copy in ray.get(copies)]


def draft_of(group: TrainerGroup) -> dict[str, torch.Tensor]:
    first, *others = drafts(group)
    for other in others:
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    return first


def published(group: TrainerGroup, controller) -> dict[str, torch.Tensor]:
    """What arrived, in float32."""
    group._version = max(group.version, ray.get(controller.live_version.remote()) + 1)
    group.publish()
    return decoded(ray.get(controller.state.remote())[0], ray.get(controller.get_plans.remote()))


def samples_of(model: Qwen3MoeForCausalLM, batches: list[MicroBatch], groups: list[Group]) -> list[DraftSample]:
    """What a rank should learn from, from the trajectories themselves and plain forwards."""
    trajectories = {(*t.prompt_token_ids, *t.token_ids): t for group in groups for t in group.trajectories}
    found = []
    for batch in batches:
        for row in range(len(batch.input_ids)):
            tokens = batch.input_ids[row, : batch.lengths[row]]
            trajectory = trajectories.get(tuple(tokens.tolist()))
            if trajectory is None or len(trajectory.token_ids) < 2:
                continue
            with torch.no_grad():
                hidden = model.model(tokens[None], use_cache=False).last_hidden_state[0]
            found.append(
                DraftSample(
                    token_ids=tokens,
                    num_prompt_tokens=len(trajectory.prompt_token_ids),
                    hidden=hidden,
                    seed=trajectory.seed,
                )
            )
    return found


def test_the_first_publication_has_the_draft_as_it_was_and_every_tensor_of_the_model(
    group: TrainerGroup, controller, model_dir: Path
) -> None:
    got = published(group, controller)
    _, shipped = load_draft(model_dir / "draft")
    for name, tensor in shipped.items():
        assert torch.equal(got[f"draft.{name}"], tensor)
    assert got.keys() == ray.get(controller.get_plans.remote()).keys() > {"lm_head.weight", "draft.trust_by_depth"}


def test_ranks_learn_from_their_own_trajectories_and_agree(group: TrainerGroup, controller, model_dir: Path) -> None:
    before = published(group, controller)
    groups = make_groups(1)
    selection = select(groups, config(), 4096)
    plans = plan_updates(selection.samples, config(), 4096)
    version = group.version + 1
    metrics = group.train_step(groups)
    after = published(group, controller)
    assert ray.get(controller.state.remote())[1][0] == "begin delta"
    # Hidden states are those of the policy before its update, the layers shared those after it.
    model = plain_model(model_dir, before)
    shared = TargetLayers.of(after["model.embed_tokens.weight"], after["lm_head.weight"])
    want = []
    for rank, plan in enumerate(plans):
        batches = [batch for mini in plan for batch in mini.batches]
        order = torch.Generator().manual_seed(config().seed * 1_000_003 + version * 2 + rank)
        chosen_rows(batches, UPDATE.max_tokens, order)  # all of them: there is room
        draft = CloverDraft(SHAPE)
        draft.load(load_draft(model_dir / "draft")[1])
        own = DraftTrainingConfig(online_lr=UPDATE.lr, batch_tokens=UPDATE.batch_tokens, temperature=TEMPERATURE)
        samples = samples_of(model, batches, groups)
        want += DraftTrainer(draft, own).update(
            samples, target=shared, num_steps=UPDATE.num_steps, generator=order, version=1
        )
    assert metrics.draft is not None
    # Averaged or not, the steps are of at most 6e-6 here (a rise of 3 in 50), which moves a loss of about 5 by less.
    assert metrics.draft.loss == pytest.approx(sum(w.loss for w in want) / len(want), rel=1e-3)
    own_draft = draft_of(group)
    assert {name for name in after if name.startswith("draft.")} == own_draft.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in own_draft.items())
    moved = max(float((after[name] - before[name]).abs().max()) for name in own_draft)
    assert 0 < moved <= UPDATE.num_steps * UPDATE.lr * 1.1  # three steps of at most the step size, and decay


def test_lessons_of_one_rank_alone_teach_both(group: TrainerGroup) -> None:
    groups = make_groups(5, num_groups=1, size=2)
    members = groups[0].trajectories
    for member, length in zip(members, (30, 1), strict=True):
        member.token_ids, member.logprobs, member.loss_mask = [7] * length, [-1.0] * length, [1] * length
        member.status, member.reward, member.error = groups[0].trajectories[0].status, float(length), None
    before = draft_of(group)
    metrics = group.train_step(groups)
    assert metrics.num_trained_trajectories == 2 and metrics.draft is not None and metrics.draft.loss > 0
    after = draft_of(group)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_outputs_of_one_token_teach_nothing(group: TrainerGroup) -> None:
    groups = make_groups(6, num_groups=2, size=2)
    for member in (t for g in groups[1:] for t in g.trajectories):
        member.token_ids, member.logprobs, member.loss_mask = [7], [-1.0], [1]
    before = draft_of(group)
    metrics = group.train_step(groups[1:])
    assert metrics.num_trained_trajectories == 2 and metrics.draft is None
    assert all(torch.equal(tensor, draft_of(group)[name]) for name, tensor in before.items())


def test_a_nan_in_the_draft_is_refused_before_anything_is_sent(group: TrainerGroup, controller) -> None:
    published(group, controller)

    def poison(rank, value: float) -> float:
        parameter = rank._draft.parameters["draft.block_norm.weight"]
        old = float(parameter.data[3])
        parameter.data[3] = value
        return old

    old = ray.get([rank.__ray_call__.remote(poison, float("nan")) for rank in group._ranks])[0]
    with pytest.raises(SyncRefused, match=r"draft\.block_norm\.weight.*NaN"):
        published(group, controller)
    ray.get([rank.__ray_call__.remote(poison, old) for rank in group._ranks])
    published(group, controller)


def test_the_policy_learns_the_same_without_and_a_resumed_draft_goes_on_with_the_same_bits(group: TrainerGroup) -> None:
    group.save(Cursor(step=group.version, version=group.version, data_cursor=1))
    step = group.version
    metrics = group.train_step(make_groups(10))
    weights, tensors = group.weights_digest(), draft_of(group)

    everywhere(group, lambda rank: setattr(rank, "_draft", None))
    assert group.load_latest() is not None and group.version == step
    assert group.train_step(make_groups(10)).draft is None
    assert group.weights_digest() == weights

    everywhere(group, new_draft)
    assert group.load_latest() is not None and group.version == step
    again = group.train_step(make_groups(10))
    assert replace(again, duration_s=0.0) == replace(metrics, duration_s=0.0)
    resumed = draft_of(group)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in tensors.items())

    path = group._checkpoints.path(step) / DRAFT_FILE
    assert path.name in json.loads((path.parent / "manifest-0.json").read_text())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointBroken, match="bytes"):
        group.load_latest()


def everywhere(group: TrainerGroup, call) -> None:
    ray.get([rank.__ray_call__.remote(call) for rank in group._ranks])


def new_draft(rank) -> None:
    """As a rank has it that was just started."""
    draft = fitting_draft(rank._model.path, rank._encoding.draft_model)
    rank._draft = OnlineDraft(rank._config, rank._engine.module, draft, TEMPERATURE, rank._rank, rank._device)


def lone_draft(model_dir: Path) -> OnlineDraft:
    return OnlineDraft(config(), None, fitting_draft(model_dir, model_dir / "draft"), 1.0, 0, torch.device("cpu"))


def test_a_checkpoint_without_a_draft_or_with_another_is_refused(model_dir: Path, tmp_path: Path) -> None:
    draft = lone_draft(model_dir)
    with pytest.raises(InvalidRequest, match=r"draft_travels.*written without a draft"):
        draft.load(tmp_path, 3)
    draft.save(tmp_path, 3)
    with pytest.raises(CheckpointBroken, match="got a draft of version 3, not 4"):
        draft.load(tmp_path, 4)
    lone_draft(model_dir).load(tmp_path, 3)
    saved = torch.load(tmp_path / DRAFT_FILE, weights_only=True)
    del saved["tensors"]["block_norm.weight"]
    torch.save(saved, tmp_path / DRAFT_FILE)
    with pytest.raises(CheckpointBroken, match="not of this draft model"):
        draft.load(tmp_path, 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vocab_size": 130}, "draft model's vocabulary: got 130 tokens"),
        ({"hidden_size": 64}, "draft model's hidden size: got 64"),
        ({"target_version": 2}, "draft model's target version: got 2"),
    ],
)
def test_a_draft_of_another_model_or_version_is_refused_before_anything_starts(
    other: dict[str, int], message: str, model_dir: Path, tmp_path: Path
) -> None:
    shape = replace(SHAPE, **other)
    save_draft(tmp_path / "draft", shape, CloverDraft(shape).state_dict())
    speculation = replace(engine(model_dir).speculation, draft_model=str(tmp_path / "draft"))
    with pytest.raises(InvalidRequest, match=message):
        start_group(model_dir, tmp_path, None, EngineConfig(speculation=speculation))


def test_rows_are_chosen_within_the_limit_and_at_random() -> None:
    selection = select(make_groups(8, num_groups=12), config(), 4096)
    batches = [b for mini in plan_updates(selection.samples, config(), 4096)[0] for b in mini.batches]
    seen = set()
    for seed in range(20):
        rows = chosen_rows(batches, 100, torch.Generator().manual_seed(seed))
        assert rows == chosen_rows(batches, 100, torch.Generator().manual_seed(seed))
        lengths = [int(b.lengths[row]) for b, some in zip(batches, rows, strict=True) for row in some]
        assert 50 < sum(lengths) <= 100, "no trajectory is longer than 50, so there is room for another below that"
        assert all((b.weights[row] > 0).sum() > 1 for b, some in zip(batches, rows, strict=True) for row in some)
        seen.add(str(rows))
    assert len(seen) > 10
    (alone,) = [some for some in chosen_rows(batches, 1, torch.Generator().manual_seed(0)) if some]
    assert len(alone) == 1, "one trajectory, however long"
