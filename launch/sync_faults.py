"""Publications that a sender damages, one way after another, while generations run. A part of launch.bench_sync.

What shards and messages can do wrong is tested exhaustively without engines (tests/rollout); here real
engines are given everything that a broken or dying sender can send.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from actors.service import Service, start_service
from launch.background_load import BackgroundLoad
from launch.sync_stall import mixed_votes, take_steps
from launch.workload import Workload
from rollout.client import RolloutClient
from rollout.config import RunConfig
from rollout.errors import LongrollError, SyncRefused
from rollout.sync.encoding import Encoding, TensorPlan
from rollout.sync.manifest import BucketRef, torch_dtype
from rollout.sync.outgoing import OutgoingVersion
from rollout.sync.segments import SHARED_MEMORY, unlink

LOAD_TOKENS = 256
FAULTS_BETWEEN_VERSIONS = 10
NOISE = 1e-3
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """What damaged publications did.

    Attributes:
        num_faults: Damaged publications, each of which must be refused.
        by_kind: How many of each kind.
        num_accepted: Damaged ones that were not refused.
        num_versions: Good publications in between, all of which must succeed.
        num_votes_compared, num_mixed: Forwards of which both shards told the version; those that differed.
        num_unpublished: Versions that a token or a forward names and that were never committed.
        num_trajectories, num_lost: Generations meanwhile; those not returned whole.
    """

    num_faults: int
    by_kind: dict[str, int]
    num_accepted: int
    num_versions: int
    num_votes_compared: int
    num_mixed: int
    num_unpublished: int
    num_trajectories: int
    num_lost: int


class Sender:
    """A sender that can go wrong.

    Args:
        client: Of the service.
        plans: How tensors are served.
        weights: Of the model, by checkpoint name.
    """

    def __init__(self, client: RolloutClient, plans: dict[str, TensorPlan], weights: Weights) -> None:
        self._client, self._plans, self._weights = client, plans, weights
        self._random = random.Random(0)

    def weights(self) -> Weights:
        """Those of the model with some noise, in the dtypes that are served."""
        generator = torch.Generator().manual_seed(self._random.getrandbits(32))
        found = {}
        for name, tensor in self._weights.items():
            noisy = tensor + NOISE * torch.randn(tensor.shape, generator=generator) * (tensor.ndim == 2)
            plan = self._plans[name]
            found[name] = noisy if plan.encoding is Encoding.INT4 else noisy.to(torch_dtype(plan.dtype))
        return found

    def publish(self, version: int) -> None:
        """A good publication."""
        self._client.publish(version, self.weights())

    def damaged(self, version: int, damage: Callable[[BucketRef], BucketRef | None]) -> None:
        """Publish with one bucket damaged; None leaves the bucket out.

        Raises:
            SyncRefused: As it should.
        """
        refs = self._opened(version)
        victim = self._random.randrange(len(refs))
        try:
            for index, ref in enumerate(refs):
                sent = damage(ref) if index == victim else ref
                if sent is not None:
                    self._client.publish_bucket(sent)
            self._client.commit_publish(version)
        finally:
            for ref in refs:
                unlink(ref)

    def vanish(self, version: int) -> None:
        """Send some buckets and never come back; the next publication finds them."""
        refs = self._opened(version)
        for ref in refs[: self._random.randrange(len(refs))]:
            self._client.publish_bucket(ref)
        for ref in refs:
            unlink(ref)
        raise SyncRefused("the sender is gone")  # refused by what follows: nobody can commit it

    def past(self, live: int) -> None:
        """A version that is not newer."""
        self._client.publish(self._random.randint(0, live), self.weights())

    def wrong_base(self, version: int) -> None:
        """Changes against a version that is not served."""
        outgoing = OutgoingVersion(version, self.weights(), self._plans, 2**20)
        self._client.begin_publish(version, version + 1, outgoing.pieces)

    def incomplete_plan(self, version: int) -> None:
        """A plan that leaves out a tensor."""
        outgoing = OutgoingVersion(version, self.weights(), self._plans, 2**20)
        self._client.begin_publish(version, None, outgoing.pieces[:-1])

    def not_finite(self, version: int) -> None:
        """Weights with a NaN somewhere."""
        weights = self.weights()
        name = self._random.choice(sorted(weights))
        weights[name].view(-1)[self._random.randrange(weights[name].numel())] = float("nan")
        self._client.publish(version, weights)

    def corrupt(self, ref: BucketRef) -> BucketRef:
        """Flip a bit of a row."""
        entry = self._random.choice(ref.entries)
        row_bytes = self._plans[entry.name].row_bytes
        at = entry.rows_offset + self._random.randrange(entry.num_rows * row_bytes)
        with (SHARED_MEMORY / str(ref.segment)).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0] ^ (1 << self._random.randrange(8))
            file.seek(at)
            file.write(bytes([byte]))
        return ref

    def truncate(self, ref: BucketRef) -> BucketRef:
        """Cut off the end of the payload."""
        path = SHARED_MEMORY / str(ref.segment)
        with path.open("r+b") as file:
            file.truncate(self._random.randrange(ref.num_bytes))
        return ref

    def wrong_digest(self, ref: BucketRef) -> BucketRef:
        entries = list(ref.entries)
        at = self._random.randrange(len(entries))
        entries[at] = replace(entries[at], digest=entries[at].digest[::-1])
        return replace(ref, entries=tuple(entries))

    def lose_segment(self, ref: BucketRef) -> BucketRef:
        unlink(ref)
        return ref

    def leave_out(self, ref: BucketRef) -> None:
        return None

    def old_attempt(self, ref: BucketRef) -> BucketRef:
        return replace(ref, attempt=ref.attempt - 1)

    def _opened(self, version: int) -> list[BucketRef]:
        outgoing = OutgoingVersion(version, self.weights(), self._plans, 2**19)
        attempt = self._client.begin_publish(version, None, outgoing.pieces)
        return list(outgoing.buckets(attempt))


def kinds(sender: Sender) -> dict[str, Callable[[int], None]]:
    """Every way to go wrong, given the version that is tried."""
    buckets: dict[str, Callable[[BucketRef], BucketRef | None]] = {
        "corrupt payload": sender.corrupt,
        "truncated payload": sender.truncate,
        "wrong digest": sender.wrong_digest,
        "lost segment": sender.lose_segment,
        "bucket left out": sender.leave_out,
        "old attempt": sender.old_attempt,
    }
    found: dict[str, Callable[[int], None]] = {
        name: partial(sender.damaged, damage=damage) for name, damage in buckets.items()
    }
    return found | {
        "sender vanishes": sender.vanish,
        "version from the past": lambda version: sender.past(version - 1),
        "wrong base": sender.wrong_base,
        "incomplete plan": sender.incomplete_plan,
        "not finite": sender.not_finite,
    }


def inject(service: Service, sender: Sender, num_faults: int) -> Iterator[tuple[str, bool]]:
    """(kind, whether it was refused) of every damaged publication, with good ones in between."""
    client, ways = service.client, kinds(sender)
    names = sorted(ways)
    for number in range(num_faults):
        live = client.stats().live_version
        if number % FAULTS_BETWEEN_VERSIONS == 0:
            sender.publish(live + 1)
            live += 1
        kind = names[number % len(names)]
        try:
            ways[kind](live + 1)
            was_refused = False
        except SyncRefused:
            was_refused = client.stats().live_version == live
        yield kind, was_refused


def faults(config: RunConfig, num_faults: int) -> Injected:
    """Start the engines, keep them decoding, and damage publications."""
    config = copy.deepcopy(config)
    workload = Workload(config.workload, config.model, config.trainer.seed)
    weights = {name: t.float() for name, t in load_file(Path(config.model.path) / "model.safetensors").items()}
    counts: Counter[str] = Counter()
    num_accepted = 0
    with start_service(config.model, config.engine, config.scheduler, config.sync, config.cluster) as service:
        sender = Sender(service.client, service.plans, weights)
        take_steps(service)
        with BackgroundLoad(service, workload, LOAD_TOKENS) as load:
            for number, (kind, was_refused) in enumerate(inject(service, sender, num_faults), start=1):
                counts[kind] += 1
                num_accepted += not was_refused
                if number % 20 == 0:
                    print(f"{number} faults, {num_accepted} accepted", flush=True)
        steps = take_steps(service)
        stats = service.client.stats()
    if load.returned.error is not None:
        raise LongrollError(f"background generations: {load.returned.error}")
    num_compared, num_mixed = mixed_votes(steps)
    named = load.returned.versions | {step.version for shard in steps for step in shard}
    return Injected(
        num_faults=num_faults,
        by_kind=dict(counts),
        num_accepted=num_accepted,
        num_versions=stats.num_syncs,
        num_votes_compared=num_compared,
        num_mixed=num_mixed,
        num_unpublished=len(named - set(range(stats.live_version + 1))),
        num_trajectories=load.returned.num_submitted,
        num_lost=load.returned.num_lost,
    )
