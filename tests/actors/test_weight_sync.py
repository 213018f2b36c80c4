"""New weights on real shards: exact after the flip, refused when wrong, versions right to the token."""

import threading
import time

import pytest
import ray
import torch

from actors.service import Service
from rollout.client import RolloutClient
from rollout.config import InFlight
from rollout.errors import SyncRefused
from rollout.sync import segments
from rollout.sync.outgoing import OutgoingVersion
from rollout.types import Chunk, ChunkResult, FinishReason, SamplingParams

pytestmark = pytest.mark.engine

PROBES = [tuple(range(5 + i, 25 + 2 * i)) for i in range(6)]
NUM_GREEDY = 24


def perturbed(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Weights as far from the given ones as many optimizer steps would carry them (5 % of their spread)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: w + 0.05 * w.std() * torch.randn(w.shape, generator=generator) if w.ndim > 1 else w * 1.01
        for name, w in weights.items()
    }


def chunk(name: str, prompt: tuple[int, ...], num_tokens: int, temperature: float = 0.0, seed: int = 1) -> Chunk:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=temperature, ignore_eos=True)
    return Chunk(
        trajectory_id=name,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        max_tokens=num_tokens,
        seed=seed,
        sampling=sampling,
    )


def assert_every_shard_serves(service: Service, reference) -> None:
    """Greedy continuations of the probes on each shard equal the reference model's, token for token."""
    expected = [reference.greedy(p, NUM_GREEDY) for p in PROBES]
    for shard in service.shards:
        results: list[ChunkResult] = ray.get(
            [shard.generate.remote(chunk(f"probe/{i}", p, NUM_GREEDY)) for i, p in enumerate(PROBES)]
        )
        for prompt, result, tokens in zip(PROBES, results, expected, strict=True):
            if list(result.token_ids) == tokens:
                continue
            first = next(i for i, (a, b) in enumerate(zip(result.token_ids, tokens, strict=True)) if a != b)
            top = reference.logits(prompt, tokens)[first].topk(2).values
            assert float(top[0] - top[1]) < 1e-3, f"shard {result.shard} differs at token {first}, no near tie"


def test_each_sync_reaches_every_shard_exactly(
    client: RolloutClient, service: Service, reference, tiny_weights, restored
) -> None:
    assert_every_shard_serves(service, reference)
    before = reference.greedy(PROBES[0], NUM_GREEDY)
    for step in (1, 2):
        weights = perturbed(tiny_weights, seed=step)
        version = client.stats().live_version + 1
        report = client.publish(version, weights)
        assert report.version == client.stats().live_version == version
        assert report.num_bytes >= sum(w.numel() * 4 for w in weights.values()), "rows are padded, nothing is left out"
        reference.load(weights)
        assert_every_shard_serves(service, reference)
    assert reference.greedy(PROBES[0], NUM_GREEDY) != before, "the perturbation changed nothing"


def test_a_corrupted_bucket_is_refused_and_the_old_version_serves_on(
    client: RolloutClient, service: Service, reference, tiny_weights
) -> None:
    live = client.stats().live_version
    outgoing = OutgoingVersion(live + 1, perturbed(tiny_weights, seed=3), service.plans, 2**20)
    buckets = outgoing.buckets(client.begin_publish(live + 1, None, outgoing.pieces))
    client.publish_bucket(next(buckets))
    bad = next(buckets)
    segments.map(bad)[bad.entries[-1].rows_offset] += 1
    with pytest.raises(SyncRefused, match="digest"):
        client.publish_bucket(bad)
    with pytest.raises(SyncRefused, match="begin"):
        client.commit_publish(live + 1)
    assert client.stats().live_version == live
    assert_every_shard_serves(service, reference)


def test_wrong_names_shapes_and_versions_are_refused(
    client: RolloutClient, service: Service, reference, tiny_weights
) -> None:
    live = client.stats().live_version
    name = next(iter(tiny_weights))
    wrong_shape = {**tiny_weights, name: tiny_weights[name][:-1]}
    wrong_name = {**tiny_weights, "model.layers.99.norm.weight": torch.ones(128)}
    missing = {n: w for n, w in tiny_weights.items() if n != name}
    for weights, message in ((wrong_shape, "shape"), (wrong_name, "not a tensor of the model"), (missing, "missing")):
        with pytest.raises(SyncRefused, match=message):
            client.publish(live + 1, weights)
    with pytest.raises(SyncRefused, match="above the live version"):
        client.publish(live, tiny_weights)
    assert client.stats().live_version == live
    assert_every_shard_serves(service, reference)


@pytest.mark.parametrize("policy", list(InFlight), ids=lambda p: p.value)
def test_what_runs_during_a_sync_follows_the_policy(
    policy: InFlight, client: RolloutClient, service: Service, reference, tiny_weights, restored
) -> None:
    """wait: one version a chunk. abort: chunks end early. keep: spans change where the weights did."""
    live = client.stats().live_version
    weights = perturbed(tiny_weights, seed=4)
    running = [
        service.shards[i % 2].generate.remote(chunk(f"run/{i}", PROBES[i % 6], 300, temperature=1.0, seed=i))
        for i in range(8)
    ]
    time.sleep(0.5)
    publish_with(client, service, live + 1, weights, policy)
    results: list[ChunkResult] = ray.get(running)
    versions = [[s.version for s in r.spans] for r in results]
    assert all(r.spans[0].start == 0 and r.spans[-1].stop == len(r.token_ids) for r in results)
    if policy is InFlight.WAIT:
        assert versions == [[live]] * 8 and all(len(r.token_ids) == 300 for r in results)
    elif policy is InFlight.ABORT:
        assert versions == [[live]] * 8 and all(0 < len(r.token_ids) < 300 for r in results)
        assert {r.finish_reason for r in results} == {FinishReason.ABORT}
    else:
        assert versions == [[live, live + 1]] * 8 and all(len(r.token_ids) == 300 for r in results)
        _assert_spans_are_where_the_weights_changed(results, reference, weights)
    reference.load(weights)
    assert_every_shard_serves(service, reference)


def publish_with(client: RolloutClient, service: Service, version: int, weights, policy: InFlight) -> None:
    """Publish under a policy that need not be the service's own."""
    outgoing = OutgoingVersion(version, weights, service.plans, 2**21)
    for ref in outgoing.buckets(client.begin_publish(version, None, outgoing.pieces)):
        client.publish_bucket(ref)
    ray.get(service.controller.commit_publish.remote(version, policy))


def _assert_spans_are_where_the_weights_changed(results, reference, weights) -> None:
    """The recorded log-probabilities fit the old weights before the boundary and the new ones after it."""
    from rollout.types import Trajectory

    for place, result in enumerate(results[:3]):
        boundary = result.spans[1].start
        trajectory = Trajectory(
            group_id="run",
            sample_index=place,
            seed=place,
            prompt_token_ids=PROBES[place % 6],
            token_ids=list(result.token_ids),
            logprobs=list(result.logprobs),
        )
        recorded = torch.tensor(result.logprobs)
        old = (reference.logprobs(trajectory) - recorded).abs()
        reference.load(weights)
        new = (reference.logprobs(trajectory) - recorded).abs()
        reference.load_original()
        assert float(old[:boundary].max()) < 1e-3 and float(new[boundary:].max()) < 1e-3
        assert float(old[boundary:].max()) > 1e-2 and float(new[:boundary].max()) > 1e-2


def test_publishing_while_a_client_generates_loses_nothing(client: RolloutClient, tiny_weights, restored) -> None:
    """Groups go on through three syncs; every trajectory ends, with versions that only rise."""
    first = client.stats().live_version + 1
    handle = client.submit(PROBES, 4, SamplingParams(max_tokens=250, ignore_eos=True), run_seed=3)
    done: list = []
    reader = threading.Thread(target=lambda: done.extend(client.groups(handle)))
    reader.start()
    for step in range(3):
        client.publish(first + step, perturbed(tiny_weights, seed=10 + step))
    reader.join(timeout=120)
    assert not reader.is_alive() and len(done) == len(PROBES)
    for trajectory in (t for g in done for t in g.trajectories):
        versions = [s.version for s in trajectory.weight_versions]
        assert versions == sorted(set(versions))
        assert trajectory.weight_versions[-1].stop == len(trajectory.token_ids) == 250
