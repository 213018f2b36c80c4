"""Speculation over two expert-parallel shards: tokens, routing and versions are those of plain decoding.

Of the fixture `drafting` no token may differ.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors import routing_store
from actors.service import Service
from launch.check_speculation import Campaign, Options, verdict
from launch.workload import Workload
from rollout.config import ModelConfig, SchedulerConfig, WorkloadConfig
from rollout.governor.collapse import MIN_BEFORE
from rollout.governor.comparison import TURN_STEPS, is_on_hold
from rollout.governor.statistics import SpeculationRecord
from rollout.speculation.clover_config import load_draft
from rollout.speculation.clover_training import TENSOR_PREFIX
from rollout.speculation_config import DraftPolicy
from rollout.types import Chunk, ChunkResult, SamplingParams
from tests.actors.conftest import TINY
from tests.actors.test_keyed_engine import prompts
from tests.actors.test_weight_sync import perturbed

pytestmark = pytest.mark.engine

ALL = ["adversarial", "clover2", "random", "sibling"]
NUM_TOKENS = 64
NUM_MEMBERS = 4
MAX_ROUNDS = 12  # of some 500 tokens on each shard, until the governor knows what steps cost and what drafts bring
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def off_afterwards(drafting: Service) -> Iterator[None]:
    yield
    turn(drafting, [])


@pytest.fixture(scope="module")
def draft() -> dict[str, torch.Tensor]:
    """The tiny model's draft, as it travels."""
    _, tensors = load_draft(TINY / "draft")
    return {TENSOR_PREFIX + name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def weights(tiny_weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tiny model's, in the dtype that the engines serve."""
    return {name: tensor.bfloat16() for name, tensor in tiny_weights.items()}


@pytest.fixture(scope="module")
def plain(drafting: Service) -> list[ChunkResult]:
    """Five groups of four, without drafts."""
    turn(drafting, [])
    num_steps(drafting)
    return run(drafting, [chunk(i, prompt, SAMPLING, "plain") for i, prompt in enumerate(batch())])


def chunk(
    place: int, prompt: tuple[int, ...], sampling: SamplingParams, name: str, done: tuple[int, ...] = ()
) -> Chunk:
    return Chunk(
        trajectory_id=f"{name}/{place}",
        token_ids=prompt + done,
        num_prompt_tokens=len(prompt),
        max_tokens=sampling.max_tokens - len(done),
        seed=1000 + place,
        sampling=sampling,
    )


def run(service: Service, chunks: list[Chunk], shards: tuple[int, ...] = (0, 1)) -> list[ChunkResult]:
    return ray.get([service.shards[shards[i % len(shards)]].generate.remote(one) for i, one in enumerate(chunks)])


def turn(service: Service, sources: list[str], policy: str = DraftPolicy.ALWAYS) -> None:
    ray.get([shard.turn_speculation.remote(sources, policy) for shard in service.shards])


def num_steps(service: Service) -> int:
    """Forwards of the shards since the last call."""
    return sum(len(ray.get(shard.take_steps.remote())) for shard in service.shards)


def take_records(service: Service) -> list[SpeculationRecord]:
    """Of each shard, since the last call."""
    return ray.get([shard.take_speculation.remote() for shard in service.shards])


def batch() -> list[tuple[int, ...]]:
    return [prompt for prompt in prompts(5) for _ in range(NUM_MEMBERS)]


def test_tokens_routing_and_logprobs_are_those_of_plain_decoding(drafting: Service, plain: list[ChunkResult]) -> None:
    """On both shards, and on one while the other has nothing to do."""
    plain_steps = num_steps(drafting)
    turn(drafting, ALL)
    drafted = run(drafting, [chunk(i, prompt, SAMPLING, "drafted") for i, prompt in enumerate(batch())])
    drafted_steps = num_steps(drafting)
    alone = run(drafting, [chunk(i, prompt, SAMPLING, "alone") for i, prompt in enumerate(batch()[:6])], shards=(1,))
    assert drafted_steps < 0.8 * plain_steps, "drafts were accepted"
    for a, b in [*zip(plain, drafted, strict=True), *zip(plain, alone, strict=False)]:
        assert a.token_ids == b.token_ids
        # Sums of the softmax in another order; float32 from equal logits.
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 1e-5
    for a, b in zip(plain, drafted, strict=True):
        assert a.drafts is not None and (a.drafts.trees, a.drafts.nodes, a.drafts.accepted) == (0, 0, 0)
        assert b.drafts is not None and 0 < b.drafts.trees < NUM_TOKENS
        assert b.drafts.trees <= NUM_TOKENS - b.drafts.accepted <= b.drafts.trees + 2, "a step gives one more"
        assert b.drafts.accepted <= b.drafts.nodes <= 12 * b.drafts.trees
    for place, (a, b) in enumerate(zip(plain, drafted, strict=True)):
        num_rows = len(batch()[place]) + NUM_TOKENS - 1
        ours, theirs = (routing_store.fetch([one.routing], num_rows) for one in (a, b))
        assert ours is not None and theirs is not None and len(ours) == len(theirs) == num_rows
        assert np.array_equal(np.sort(ours), np.sort(theirs))


def test_cut_and_resumed_on_the_other_shard(drafting: Service, plain: list[ChunkResult]) -> None:
    turn(drafting, ALL)
    done: list[tuple[int, ...]] = [()] * len(plain)
    for piece in range(NUM_TOKENS // 32):
        short = SamplingParams(max_tokens=32 * (piece + 1), temperature=1.0, ignore_eos=True)
        pieces = [chunk(i, prompt, short, "cut", done[i]) for i, prompt in enumerate(batch())]
        results = run(drafting, pieces, shards=(piece % 2, (piece + 1) % 2))
        done = [tokens + result.token_ids for tokens, result in zip(done, results, strict=True)]
    assert done == [result.token_ids for result in plain]


def test_compared_drafts_are_on_hold_on_all_shards_at_once(drafting: Service, plain: list[ChunkResult]) -> None:
    """By turns of a few steps, in which nothing is drafted behind a step; tokens are those of plain decoding."""
    turn(drafting, ["clover2"], DraftPolicy.COMPARED)
    num_steps(drafting)
    drafted_behind: list[bool] = []
    for round_ in range(MAX_ROUNDS):
        results = run(drafting, [chunk(i, prompt, SAMPLING, f"compared-{round_}") for i, prompt in enumerate(batch())])
        assert [one.token_ids for one in results] == [one.token_ids for one in plain]
        for shard in drafting.shards:
            for before, step in itertools.pairwise(ray.get(shard.take_steps.remote())):
                if step.num_trees:
                    drafted_behind.append(not is_on_hold(before.vote))
        if len(drafted_behind) >= 2 * TURN_STEPS:
            break
    assert all(drafted_behind) and len(drafted_behind) >= 2 * TURN_STEPS


def test_a_campaign_compares_every_drafter(drafting: Service, tmp_path: Path) -> None:
    """What `launch.check_speculation` does with hundreds of thousands of tokens, with few."""
    model, out = ModelConfig(path=str(TINY)), tmp_path / "report.json"
    options = Options(tokens=1, prompts=1, members=4, temperatures=(0.0, 0.7), top_p=(0.9,), out=str(out))
    said: list[str] = []
    workload = Workload(WorkloadConfig(), model, 0)
    campaign = Campaign(drafting, workload, options, dtype="bfloat16", max_tokens=NUM_TOKENS, say=said.append)
    campaign.run()
    result = json.loads(out.read_text())
    assert verdict(campaign.reports) is None and result["num_different"] == 0
    assert set(result["drafters"]) == set(options.drafters) and len(said) == 2 * (len(options.drafters) + 1)
    tokens = [one["num_tokens"] for one in result["drafters"].values()]
    assert len(set(tokens)) == 1 and sum(tokens) == result["num_tokens"] > 0
    assert result["drafters"]["clover2"]["accepted_a_step"] > result["drafters"]["random"]["accepted_a_step"]
    assert len(result["by_member"]) == 4


def test_new_weights_in_the_middle(
    drafting: Service, plain: list[ChunkResult], weights: dict[str, torch.Tensor], draft: dict[str, torch.Tensor]
) -> None:
    """Every token is a function of its own version's weights, though drafts were made under the one before."""
    client = drafting.client
    long = SamplingParams(max_tokens=256, temperature=1.0, ignore_eos=True)
    turn(drafting, ALL)
    first = client.stats().live_version
    try:
        chunks = [chunk(i, prompt, long, "over") for i, prompt in enumerate(batch()[:8])]
        waiting = [drafting.shards[i % 2].generate.remote(one) for i, one in enumerate(chunks)]
        changed = perturbed({name: tensor.float() for name, tensor in weights.items()}, seed=4)
        client.publish(first + 1, {name: tensor.bfloat16() for name, tensor in changed.items()} | draft)
        over: list[ChunkResult] = ray.get(waiting)
        turn(drafting, [])
        flipped: list[int] = []
        stops = []
        for place, (result, old) in enumerate(zip(over, plain, strict=False)):
            assert {span.version for span in result.spans} <= {first, first + 1}
            stops.append(result.spans[0].stop if result.spans[0].version == first else 0)
            common = min(stops[place], NUM_TOKENS)
            assert result.token_ids[:common] == old.token_ids[:common]
            if 0 < stops[place] < long.max_tokens:
                flipped.append(place)
        assert flipped, "the publication came while they ran"
        again = [chunk(i, batch()[i], long, "rest", over[i].token_ids[: stops[i]]) for i in flipped]
        for place, rest in zip(flipped, run(drafting, again), strict=True):
            assert rest.token_ids == over[place].token_ids[stops[place] :]
    finally:
        client.publish(client.stats().live_version + 1, weights | draft)


def test_a_corrupted_draft_raises_the_alarm_within_one_chunk(
    drafting: Service, weights: dict[str, torch.Tensor], draft: dict[str, torch.Tensor]
) -> None:
    """A publication brings the same target with a draft of noise; the governor sees it, and a good one ends it.

    The longest answers to prompts that the draft was trained for, four on each shard, the same every time: with the
    draft a step gives several tokens of one, so that it pays.
    """
    client, workload = drafting.client, Workload(WorkloadConfig(), ModelConfig(path=str(TINY)), 0)
    sampling = SamplingParams(max_tokens=256, temperature=1.0)
    asked = [chunk(i, one.token_ids, sampling, "corrupted") for i, one in enumerate(workload.batch(0, 40))]
    lengths = [len(result.token_ids) for result in run(drafting, asked)]
    longest = sorted(range(len(asked)), key=lambda place: -lengths[place])[:8]

    def one_chunk_each() -> list[SpeculationRecord]:
        """What speculation came to on each shard meanwhile."""
        results = run(drafting, [asked[place] for place in longest])
        assert [len(result.token_ids) for result in results] == [lengths[place] for place in longest]
        return take_records(drafting)

    def publish(sent: dict[str, torch.Tensor]) -> None:
        client.publish(client.stats().live_version + 1, weights | sent)

    turn(drafting, ["clover2"], DraftPolicy.GOVERNED)
    take_records(drafting)
    num_known = [0.0, 0.0]  # first nodes that each shard's governor verified, to compare later ones with
    try:
        for _ in range(MAX_ROUNDS):
            healthy = one_chunk_each()
            assert not any(one.num_alarms for one in healthy)
            for rank, one in enumerate(healthy):
                num_known[rank] += one.by_source["clover2"].trials[0, 0] if one.by_source else 0.0
            if all(one.num_off_steps < one.num_steps / 2 for one in healthy) and min(num_known) >= 2 * MIN_BEFORE:
                break
        else:
            pytest.fail(f"the governor does not take to a draft that pays: {healthy}")
        publish({name: torch.randn_like(tensor) for name, tensor in draft.items()})
        alarms, num_tokens = [0] * len(healthy), 0
        while not all(alarms) and num_tokens < SchedulerConfig().chunk_tokens:  # of the longest trajectory
            for rank, fallen in enumerate(one_chunk_each()):
                alarms[rank] += sum(fallen.num_alarms.values())
            num_tokens += lengths[longest[0]]
        assert alarms == [1] * len(healthy), f"after {num_tokens} tokens"
        for after in one_chunk_each():
            assert after.num_off_steps > 0.9 * after.num_steps, "but for a trial now and then"
    finally:
        publish(draft)
    for recovered in one_chunk_each():
        assert not recovered.num_alarms and recovered.by_source["clover2"].accepted > 0
