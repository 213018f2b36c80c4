"""The publication of a weight version to a fleet: begin → stage … → commit, or abandon.

    IDLE ──begin──► STAGING ──stage(bucket)──► STAGING ──commit──► FLIPPING ──┬─► IDLE (new version)
     ▲                 │ any fault, abandon, or the begin of another           │
     └─────────────────┴── every shard drops what it staged (old version) ◄────┤ before the decision
                                                                               └─► BROKEN (no group left)

Commit: verify on all shards ─► their digests agree ─► (pause) ─► DECISION ─► arm ─► flip ─► (resume).
Nothing a sender or a shard can do wrong reaches a live weight before the decision, as shards stage
beside them. After it each expert-parallel group goes over on its own (`rollout.sync.switch`); a group
that did not while another did is lost to the fleet until it has caught up. With the policy `keep`
nothing pauses: each shard flips between two forwards, and the ranks of a group before the same forward.

Messages to the shards, all of one attempt (see `rollout.sync.participant`):

    message   lost or late                                   doubled
    begin     refused; late: from the past, or superseded    answered again
    stage     refused                                        answered again without work
    verify    refused                                        same digest again
    drop      the next begin drops it; nothing is armed      answered again
    arm       sent again; then the group is asked to drop    answered again
    flip      sent again; the group flips by vote meanwhile  answered again with the live version
    pause     refused, and everybody resumed                 harmless
    resume    sent again; then the group is lost             harmless

(pause and resume carry no attempt: calls to one shard must arrive in the order in which they were made.)

Messages of senders: `begin` opens a new attempt each time; `stage` and `commit` may be doubled, and a
commit whose answer was lost is answered with its report.

Owns the version number, the attempts and the state. Knows nothing of Ray or vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from rollout.config import InFlight, SyncConfig
from rollout.errors import EngineDead, LongrollError, SyncRefused
from rollout.fleet import Rendezvous, SyncReport
from rollout.sync.attempt import Attempt
from rollout.sync.catch_up import behind_live, bring_up
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import BucketRef, Piece, check_tiling
from rollout.sync.members import Members, OnDead
from rollout.sync.receivers import Call, Receiver, ask, failed, insist, said, watched
from rollout.sync.switch import Fate, Outcome, reasons, switch_groups

logger = logging.getLogger(__name__)


class State(str, Enum):
    """See the module's diagram."""

    IDLE = "idle"
    STAGING = "staging"
    FLIPPING = "flipping"
    BROKEN = "broken"


class Publisher:
    """Runs publications, one at a time.

    Args:
        receivers: The shards of the fleet, by rank.
        groups: Expert-parallel group of every rank.
        plans: Encoding of every tensor of the model, by name.
        config: Timeouts and the in-flight policy.
        live_version: Version served at the start, by all shards.
        clock: Seconds, monotonic.
        on_dead: Told which ranks must be restarted, and why. They do not serve from then on.
        num_attempts: Attempts before, by whoever published to the same shards: the next one's number is above.
    """

    def __init__(
        self,
        receivers: Mapping[int, Receiver],
        groups: Mapping[int, int],
        plans: Mapping[str, TensorPlan],
        config: SyncConfig,
        live_version: int = 0,
        clock: Callable[[], float] = time.monotonic,
        on_dead: OnDead | None = None,
        num_attempts: int = 0,
    ) -> None:
        self._members = Members(receivers, groups, on_dead)
        self._num_rows = {name: plan.num_rows for name, plan in plans.items()}
        self._num_bytes_full = sum(plan.num_bytes for plan in plans.values())
        self._config, self._clock = config, clock
        self._live_version = live_version
        self._num_attempts = num_attempts
        self._attempt: Attempt | None = None
        self._commit: asyncio.Task[SyncReport] | None = None
        self._last_report: SyncReport | None = None
        self._live_digest: str | None = None
        self._catching_up = asyncio.Lock()

    @property
    def live_version(self) -> int:
        return self._live_version

    @property
    def serving(self) -> frozenset[int]:
        """Ranks that hold the live version; no others may be given requests."""
        return self._members.serving

    @property
    def attempt(self) -> int | None:
        """Number of the open attempt."""
        return None if self._attempt is None else self._attempt.number

    @property
    def state(self) -> State:
        if not self.serving:
            return State.BROKEN
        if self._commit is not None:
            return State.FLIPPING
        return State.IDLE if self._attempt is None else State.STAGING

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        """Let every shard join its sender's transport, for one that needs it; before `begin`.

        Args:
            rendezvous: Where the sender, rank 0, waits for them.
            world_size: The sender and every worker of every shard.

        Raises:
            SyncRefused: A shard could not join in time; the old version goes on serving.
            EngineDead: No shard is left.
        """
        self._check_can_begin("transport")
        if self._attempt is not None:
            await self._drop(self._attempt, "its senders open another transport")
        receivers, timeout_s = self._members.receivers(), self._config.timeout_s
        faults = failed(await ask(receivers, lambda r: r.open_transport(rendezvous, world_size), timeout_s))
        self._members.note_deaths(faults)
        if faults:
            raise self._refusal("open_transport", faults, len(receivers), timeout_s)

    async def begin(self, version: int, base: int | None, pieces: Sequence[tuple[int, Piece]]) -> int:
        """Open a publication. One that was left unfinished is abandoned: its sender is gone.

        Args:
            version: Must exceed the live version.
            base: The live version, if senders will send changes against it; None if they send every row.
            pieces: What will be sent, and by which sender. Each piece travels as one entry of a bucket.

        Returns:
            Number of this attempt, which every bucket must carry.

        Raises:
            SyncRefused: The version is not newer, the base is not live everywhere (send everything then),
                or the pieces do not cover every tensor exactly once.
            EngineDead: No shard is left.
        """
        self._check_can_begin(f"version {version}")
        if version <= self._live_version:
            raise SyncRefused(f"version: got {version}, expected one above the live version {self._live_version}")
        if base is not None and base != self._live_version:
            raise SyncRefused(f"base: got {base}, expected the live version {self._live_version}; send everything")
        check_tiling(self._num_rows, (piece for _, piece in pieces))
        if self._attempt is not None:  # its messages are refused from now on; begin undoes its staging
            logger.warning("publication of version %d was left unfinished; dropping it", self._attempt.version)
            self._attempt.end_reason = "another one began"
        now = self._clock()
        attempt = self._attempt = Attempt(
            number=self._next_attempt(),
            version=version,
            base=base,
            receivers=self._members.receivers(),
            pending=set(pieces),
            began_at=now,
            staged_at=now,
        )
        await self._all(attempt, "begin", lambda r: r.begin(attempt.number, version, base))
        return attempt.number

    async def stage(self, ref: BucketRef) -> None:
        """Let every shard take in a bucket. Buckets may come in any order, from several senders at once.

        Raises:
            SyncRefused: A shard refuses it or does not answer, or it does not belong here. The publication
                is over, unless the bucket belongs to another one; the old version goes on serving.
            EngineDead: No shard is left.
        """
        attempt = self._expect_open(f"stage of version {ref.version}", ref.version, State.STAGING)
        if ref.attempt != attempt.number:
            raise SyncRefused(f"{ref}: a message from the past: got attempt {ref.attempt}, expected {attempt.number}")
        try:
            staging = attempt.find(ref)
            if staging is None:
                attempt.admit(ref)
                staging = watched(self._stage_everywhere(attempt, ref))
                attempt.staging[ref.sender, ref.index] = (ref, staging)
        except SyncRefused as fault:
            await self._drop(attempt, str(fault))
            raise
        await asyncio.shield(staging)

    async def commit(self, version: int, in_flight: InFlight | None = None) -> SyncReport:
        """Switch every shard to the staged version, with another policy than configured if `in_flight` says so.

        Goes on to its end if the caller is cancelled.

        Raises:
            SyncRefused: Something is missing, digests differ, or no group could be switched; the old
                version goes on serving.
            EngineDead: No shard is left. If only some are lost, the report and `on_dead` name them.
        """
        if self._last_report is not None and version == self._last_report.version:
            return self._last_report
        attempt = self._expect_open(f"commit of version {version}", version, State.STAGING, State.FLIPPING)
        if self._commit is None:
            self._commit = watched(self._run_commit(attempt, in_flight or self._config.in_flight))
        return await asyncio.shield(self._commit)

    async def abandon(self, version: int) -> None:
        """Give up a publication; does nothing if it is not the open one, or is being flipped already."""
        if self.state is State.STAGING and self._attempt is not None and version == self._attempt.version:
            await self._drop(self._attempt, "it was abandoned")

    def lose(self, ranks: Iterable[int]) -> frozenset[int]:
        """Shards are known to be gone: their groups serve no longer. Returns the ranks that served until now."""
        return self._members.lose(ranks)

    def restarted(self, receivers: Mapping[int, Receiver]) -> None:
        """Shards were started anew; they serve once they have caught up."""
        self._members.replace(receivers)

    def joined(self, receivers: Mapping[int, Receiver], group: int) -> None:
        """A further group was started; it serves once it has caught up."""
        self._members.add(receivers, group)

    async def catch_up(self, rank: int, refs: Sequence[BucketRef]) -> None:
        """Bring a shard that does not serve, and those of its group with it, to the live version.

        An open publication is refused at its next step, as it was begun without them.

        Args:
            rank: The shard; nothing happens if it serves.
            refs: Full buckets of the live version that their senders keep, of whatever attempt; not
                needed by shards that loaded that very version.

        Raises:
            SyncRefused: The buckets are not all of the live version, or something failed; try again.
            EngineDead: A shard of the group is gone.
        """
        async with self._catching_up:
            version, timeout_s = self._live_version, self._config.timeout_s
            receivers = self._members.waiting_beside(rank)
            behind = await behind_live(receivers, version, timeout_s)
            if behind:
                await bring_up(
                    {r: receivers[r] for r in behind},
                    refs,
                    attempt=self._next_attempt(),
                    version=version,
                    num_rows=self._num_rows,
                    expected_digest=self._live_digest,
                    timeout_s=timeout_s,
                )
            if self._live_version != version or self._commit is not None:
                raise SyncRefused(f"catching up: version {version} is not the newest any more; catch up again")
            if self._members.waiting_beside(rank) != receivers:
                raise SyncRefused(f"catching up: the group of shard {rank} was restarted meanwhile; catch up again")
            self._members.welcome(receivers)

    def _next_attempt(self) -> int:
        self._num_attempts += 1
        return self._num_attempts

    def _check_can_begin(self, what: str) -> None:
        if self.state is State.BROKEN:
            raise EngineDead(f"{what}: no shard serves; the fleet must be restarted and catch up")
        if self._commit is not None:
            raise SyncRefused(f"{what}: another version is being flipped at this moment")

    def _expect_open(self, what: str, version: int, *states: State) -> Attempt:
        if self.state is State.BROKEN:
            raise EngineDead(f"{what}: no shard serves; the fleet must be restarted and catch up")
        attempt = self._attempt
        if attempt is None or version != attempt.version or self.state not in states:
            raise SyncRefused(
                f"{what}: got it while {self.state.value} "
                f"(open publication: {attempt and attempt.version}), expected begin() first"
            )
        return attempt

    async def _stage_everywhere(self, attempt: Attempt, ref: BucketRef) -> None:
        await self._all(attempt, "stage", lambda r: r.stage(ref))
        attempt.count(ref, self._clock())

    async def _run_commit(self, attempt: Attempt, in_flight: InFlight) -> SyncReport:
        began_at = self._clock()
        paused_at: float | None = None
        try:
            digest = await self._verify(attempt)
            if in_flight is not InFlight.KEEP:
                paused_at = self._clock()
                await self._pause(attempt, in_flight)
            outcomes = await switch_groups(
                attempt.receivers, self._members.groups, attempt.number, attempt.version, self._config.timeout_s
            )
            is_live = self._conclude(attempt, outcomes, digest)
            flipped_at = self._clock()
            if paused_at is not None:
                await self._resume(attempt)
        finally:
            self._commit = None
            if self._attempt is attempt:
                self._attempt = None
        if not self.serving:
            raise EngineDead(f"version {attempt.version}: no shard is left that serves: {reasons(outcomes)}")
        if not is_live:
            raise SyncRefused(f"version {attempt.version}: the old version goes on serving: {reasons(outcomes)}")
        self._last_report = attempt.report(
            num_tensors=len(self._num_rows),
            num_bytes_full=self._num_bytes_full,
            flip_s=flipped_at - began_at,
            stall_s=0.0 if paused_at is None else self._clock() - paused_at,
            ranks_lost=tuple(sorted(set(attempt.receivers) - self.serving)),
        )
        return self._last_report

    async def _verify(self, attempt: Attempt) -> str:
        try:
            attempt.check_complete()
            digests = await self._all(attempt, "verify", lambda r: r.verify(attempt.number))
            if len(set(digests.values())) > 1:
                raise SyncRefused(f"version {attempt.version}: shards differ: got digests {digests}, expected one")
        except SyncRefused as fault:
            await self._drop(attempt, str(fault))
            raise
        return next(iter(digests.values()))

    async def _pause(self, attempt: Attempt, mode: InFlight) -> None:
        try:
            await self._all(attempt, "pause", lambda r: r.pause(mode), self._config.pause_timeout_s(mode))
        except LongrollError:
            await self._resume(attempt)
            raise

    async def _resume(self, attempt: Attempt) -> None:
        receivers = {rank: r for rank, r in attempt.receivers.items() if rank in self.serving}
        faults = failed(await insist(receivers, lambda r: r.resume(), self._config.timeout_s))
        if faults:
            self._members.give_up(faults, f"could not be resumed: {said(faults, self._config.timeout_s)}")

    def _conclude(self, attempt: Attempt, outcomes: Mapping[int, Outcome], digest: str) -> bool:
        """Take note of what every group serves now. Returns whether the version is live."""
        is_live = any(outcome.fate is Fate.NEW for outcome in outcomes.values())
        if is_live:
            self._live_version, self._live_digest = attempt.version, digest
        for group, outcome in outcomes.items():
            if outcome.fate is Fate.LOST or (is_live and outcome.fate is Fate.OLD):
                ranks = [rank for rank in attempt.receivers if self._members.groups[rank] == group]
                self._members.give_up(ranks, f"version {attempt.version}: group {group}: {outcome.reason}")
        return is_live

    async def _drop(self, attempt: Attempt, reason: str) -> None:
        """End an attempt before its decision. A shard that does not hear of it does so by the next begin."""
        if self._attempt is not attempt:
            return
        self._attempt, attempt.end_reason = None, reason
        answers = await ask(attempt.receivers, lambda r: r.drop(attempt.number), self._config.timeout_s)
        for rank, fault in failed(answers).items():
            logger.warning("shard %d could not drop version %d: %s", rank, attempt.version, fault)

    async def _all(self, attempt: Attempt, step: str, call: Call, timeout_s: float | None = None) -> dict[int, Any]:
        """One step before the decision on every shard; the attempt is over unless all of them finish it."""
        timeout_s = timeout_s or self._config.timeout_s
        answers = await ask(attempt.receivers, call, timeout_s)
        faults = failed(answers)
        self._members.note_deaths(faults)
        if self._attempt is not attempt:
            raise SyncRefused(f"{step} of version {attempt.version}: it was over by then: {attempt.end_reason}")
        if not faults and set(attempt.receivers) == self.serving:
            return answers
        refusal = self._refusal(f"{step} of version {attempt.version}", faults, len(answers), timeout_s)
        await self._drop(attempt, str(refusal))
        raise refusal

    def _refusal(
        self, step: str, faults: Mapping[int, BaseException], num_asked: int, timeout_s: float
    ) -> LongrollError:
        if not self.serving:
            return EngineDead(f"{step}: no shard is left that serves: {said(faults, timeout_s)}")
        if not faults:
            return SyncRefused(f"{step}: shards left or joined the fleet meanwhile; send it again")
        return SyncRefused(f"{step} failed on {len(faults)} of {num_asked} shards: {said(faults, timeout_s)}")
