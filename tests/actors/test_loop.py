"""The loop on real parts: rollouts, a DeepSpeed ZeRO-3 step, a publication, and the same tokens on both sides."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.service import Service
from actors.trainer_group import TrainerGroup
from rollout.client import RolloutClient
from rollout.config import ClusterConfig, ModelConfig, SamplingConfig, SyncConfig
from rollout.tasks import TRAIN_SEED, make_task, render
from rollout.trainer_config import TrainerConfig
from rollout.types import Chunk, Prompt, SamplingParams, Status

pytestmark = pytest.mark.engine

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
NUM_GREEDY = 32
NEAR_TIE = 1e-3


@pytest.fixture(scope="module")
def trainers(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerGroup]:
    group = TrainerGroup.start(
        ModelConfig(path=str(TINY)),
        TrainerConfig(num_ranks=2, lr=1e-3),
        SamplingConfig(),
        SyncConfig(bucket_bytes=2**20),
        ClusterConfig(namespace="tests"),
        tmp_path_factory.mktemp("loop"),
        service.controller,
    )
    yield group
    group.stop()


def task_prompts(start: int, count: int) -> list[Prompt]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    task = make_task(
        "chain_sum",
        seed=TRAIN_SEED,
        size=start + count,
        options={"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1},
    )
    return [
        Prompt(
            token_ids=tuple(render(task.problem(i), tokenizer)),
            prompt_id=task.problem(i).key,
            metadata={"task": task.spec, "index": i},
        )
        for i in range(start, start + count)
    ]


def test_after_each_sync_every_shard_continues_as_the_trainer_does(
    client: RolloutClient, service: Service, trainers: TrainerGroup, reference, restored
) -> None:
    live = client.stats().live_version
    trainers._version = live  # the session's earlier tests have published versions of their own
    probes = [tuple(p.token_ids) for p in task_prompts(500, 6)]
    seen = set()
    for step in range(2):
        groups = client.rollout(
            task_prompts(8 * step, 8),
            8,
            SamplingParams(max_tokens=96),
            run_seed=1,
            reward="reasoning_gym",
            group_ids=[f"step{step}/{i}" for i in range(8)],
        )
        assert all(t.status in (Status.COMPLETED, Status.TRUNCATED) for g in groups for t in g.trajectories)
        assert all(s.version == live + step for g in groups for t in g.trajectories for s in t.weight_versions)
        metrics = trainers.train_step(groups)
        # float32 on both sides; the estimator is quadratic in differences of about 1e-6.
        assert metrics.mismatch_kl < 1e-4 and metrics.num_failed_trajectories == 0
        assert not metrics.is_skipped and metrics.grad_norm > 0
        report = trainers.publish()
        assert report.version == live + step + 1 == client.stats().live_version
        expected = trainers.greedy(probes, NUM_GREEDY)
        seen.add(tuple(c.token_ids for c in expected))
        sampling = SamplingParams(max_tokens=NUM_GREEDY, temperature=0.0, ignore_eos=True)
        for shard in service.shards:
            results = ray.get(
                [
                    shard.generate.remote(
                        Chunk(
                            trajectory_id=f"probe/{i}",
                            token_ids=p,
                            num_prompt_tokens=len(p),
                            max_tokens=NUM_GREEDY,
                            seed=0,
                            sampling=sampling,
                        )
                    )
                    for i, p in enumerate(probes)
                ]
            )
            for result, continuation in zip(results, expected, strict=True):
                first = next(
                    (
                        i
                        for i, (a, b) in enumerate(zip(result.token_ids, continuation.token_ids, strict=True))
                        if a != b
                    ),
                    None,
                )
                assert first is None or continuation.gaps[first] < NEAR_TIE, (
                    f"shard {result.shard} leaves the trainer at token {first}, gap {continuation.gaps[first]}"
                )


def test_a_failed_reward_is_left_out_of_the_step_and_counted(client: RolloutClient, trainers: TrainerGroup) -> None:
    prompts = task_prompts(40, 4)
    prompts[0] = dataclasses.replace(prompts[0], metadata={"task": "no such task", "index": 0})
    groups = client.rollout(prompts, 4, SamplingParams(max_tokens=64), run_seed=2, reward="reasoning_gym")
    metrics = trainers.train_step(groups)
    assert metrics.num_failed_trajectories == 4
    assert metrics.num_trained_trajectories <= 12
