"""A fleet in one process and in virtual time: real participants and shadows, a network with planned faults.

Two expert-parallel groups of two ranks compute forwards while two senders publish through a real
Publisher. Every message (of senders to the publisher, and of the publisher to ranks) has a number; a
plan says what goes wrong with which. After every forward the world checks what must always hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import torch

from rollout.config import InFlight, SyncConfig
from rollout.errors import EngineDead, SyncRefused
from rollout.sync.delta import compare, pack_bucket
from rollout.sync.manifest import BucketRef
from rollout.sync.participant import Participant
from rollout.sync.publication import Publisher
from tests.rollout.sync_network import Network, Violation, forever
from tests.rollout.sync_ranks import GROUPS, HELD, PIECES, PLANS, LiveWeights, Rank, Rows, SimulatedReceiver

TIMEOUT_S = 9.6  # of a step; three sends when the publisher insists, each a little longer than a round trip
FORWARD_EVERY_S = 3.1
DEATH_SEEN_AFTER_S = 3.0


class SenderDied(BaseException):
    """Thrown inside a sender: nothing in it may catch that."""


class World:
    """The fleet, its publisher, and the books of what was published and what was served.

    Args:
        faults: Kind of fault by number of message.
        participant_class: What ranks run; a broken one shows that the checks have teeth.
        is_busy: Whether forwards go on between messages, or only at the end.
        in_flight: The policy.
    """

    def __init__(
        self,
        faults: Mapping[int, str],
        participant_class: type[Participant] = Participant,
        is_busy: bool = True,
        in_flight: InFlight = InFlight.KEEP,
    ) -> None:
        self.network = Network(faults)
        self._participant_class = participant_class
        self._generator = torch.Generator().manual_seed(1)
        self.contents: list[tuple[int, Rows]] = [(0, {n: self._random(p.num_rows) for n, p in PLANS.items()})]
        self.live_content = 0
        self.content_of_attempt: dict[int, int] = {}
        self.allowed = {0}
        self.served: set[tuple[int, int]] = set()
        self.given_up: dict[int, set[int]] = {}
        self.payloads: dict[str | None, torch.Tensor] = {}
        self.is_busy, self.num_forwards = is_busy, dict.fromkeys(set(GROUPS.values()), 0)
        self.ranks = {number: self._start_rank(number, 0) for number in GROUPS}
        self.publisher = Publisher(
            {number: self._receiver(rank) for number, rank in self.ranks.items()},
            GROUPS,
            PLANS,
            SyncConfig(timeout_s=TIMEOUT_S, drain_timeout_s=TIMEOUT_S, in_flight=in_flight),
            clock=asyncio.get_running_loop().time,
            on_dead=self._on_dead,
        )
        self._forwards: dict[int, asyncio.Task] = {}
        self._violation: BaseException | None = None
        for group in set(GROUPS.values()):
            self.network.spawn(self._run_group(group))

    def _random(self, num_rows: int) -> torch.Tensor:
        return torch.randint(0, 256, (num_rows, 128), dtype=torch.uint8, generator=self._generator)

    def _start_rank(self, number: int, content: int) -> Rank:
        version, rows = self.contents[content]
        store = LiveWeights({name: rows[name] for name in HELD[number]}, version)
        return Rank(number, store, self._participant_class(store, version))

    def _receiver(self, rank: Rank) -> SimulatedReceiver:
        return SimulatedReceiver(rank, self.network, self.kill, self.payloads)

    def kill(self, rank: Rank, kind: str) -> None:
        """A process dies, and the others of its group when they notice; or it hangs for ever."""
        if kind == "hang":
            rank.is_hung = True
            return
        rank.is_dead = True
        group = GROUPS[rank.number]
        if group in self._forwards:
            self._forwards[group].cancel()
        for peer in [r for r in self.ranks.values() if GROUPS[r.number] == group]:
            asyncio.get_running_loop().call_later(DEATH_SEEN_AFTER_S, setattr, peer, "is_dead", True)

    def _on_dead(self, ranks: frozenset[int], reason: str) -> None:
        attempt = self.publisher.attempt
        for rank in ranks:
            self.given_up.setdefault(GROUPS[rank], set()).add(self.content_of_attempt.get(attempt or 0, -1))

    # Forwards

    async def _run_group(self, group: int) -> None:
        await asyncio.sleep(0.4 * group)
        while True:
            await asyncio.sleep(FORWARD_EVERY_S)
            if self.is_busy and self._can_run(group):
                self._forwards[group] = asyncio.get_running_loop().create_task(self.forward(group))
                await asyncio.wait({self._forwards[group]})
                if not self._forwards[group].cancelled() and self._forwards[group].exception() is not None:
                    self._violation = self._violation or self._forwards[group].exception()
                    return

    def _can_run(self, group: int) -> bool:
        return not any(r.is_dead or r.is_paused for r in self.ranks.values() if GROUPS[r.number] == group)

    async def forward(self, group: int) -> int:
        """One forward of all ranks of a group. Returns the version served."""
        ranks = [rank for rank in self.ranks.values() if GROUPS[rank.number] == group]
        votes: dict[int, int] = {}
        all_voted = asyncio.Event()

        async def part(rank: Rank) -> None:
            if rank.is_hung:
                await forever()
            async with rank.lock:
                votes[rank.number] = rank.participant.vote()
                if len(votes) == len(ranks):
                    all_voted.set()
                await all_voted.wait()
                await asyncio.sleep(0.3 * (rank.number % 2))
                rank.participant.settle(min(votes.values()))
                served[rank.number] = rank.participant.live_version
                matching[rank.number] = self._contents_served(rank)

        served: dict[int, int] = {}
        matching: dict[int, set[int]] = {}
        await asyncio.gather(*(part(rank) for rank in ranks))
        if len(set(served.values())) != 1:
            raise Violation(f"group {group} computed one forward under versions {served}")
        contents = set.intersection(*matching.values())
        if not contents:
            raise Violation(f"group {group} serves bytes of no version {served}: {matching}")
        self.served |= {(group, content) for content in contents}
        self.num_forwards[group] += 1
        return next(iter(served.values()))

    def _contents_served(self, rank: Rank) -> set[int]:
        version = rank.participant.live_version
        return {
            index
            for index, (of_version, rows) in enumerate(self.contents)
            if of_version == version
            and all(torch.equal(rank.store.live[name], rows[name]) for name in HELD[rank.number])
        }

    # Publications

    async def publish(self, version: int, is_delta: bool) -> bool:
        """Two senders publish new random changes, each asking twice for an answer. Returns whether they succeeded."""
        content = len(self.contents)
        old = self.contents[self.live_content][1]
        self.contents.append((version, {name: self._changed(rows) for name, rows in old.items()}))
        base = self.publisher.live_version if is_delta else None
        try:
            attempt = await self._ask("begin", lambda: self._begin(version, base, content))
            await asyncio.gather(*(self._send(sender, version, attempt, base, content) for sender in (0, 1)))
            await self._ask("commit", lambda: self._commit(version))
        except (SyncRefused, EngineDead, TimeoutError):
            with contextlib.suppress(TimeoutError, SenderDied):
                await self._ask("abandon", lambda: self.publisher.abandon(version))
            return False
        except SenderDied:
            return False
        return True

    def _changed(self, rows: torch.Tensor) -> torch.Tensor:
        new = self._random(rows.shape[0])
        keep = torch.rand(rows.shape[0], generator=self._generator) < 0.5
        new[keep] = rows[keep]
        return new

    async def _ask(self, label: str, handle: Callable[[], Awaitable[Any]]) -> Any:
        def die(kind: str) -> None:
            raise SenderDied

        limit_s = (7 if label == "commit" else 3) * TIMEOUT_S  # more than its steps and a drop take
        for resend in (True, False):
            try:
                return await asyncio.wait_for(self.network.call(f"{label}@publisher", handle, die), limit_s)
            except TimeoutError:
                if not resend:
                    raise
        raise AssertionError

    async def _begin(self, version: int, base: int | None, content: int) -> int:
        attempt = await self.publisher.begin(version, base, PIECES)
        self.content_of_attempt[attempt] = content
        return attempt

    async def _commit(self, version: int) -> None:
        content = self.content_of_attempt.get(self.publisher.attempt or 0)
        try:
            await self.publisher.commit(version)
        except EngineDead:  # no group is left, and what they served at the end is not known
            if content is not None:
                self.allowed.add(content)
            raise
        if content is not None:
            self.live_content = content
            self.allowed.add(content)

    async def _send(self, sender: int, version: int, attempt: int, base: int | None, content: int) -> None:
        ref = self.bucket(sender, version, attempt, base, content)
        await self._ask("stage", lambda: self.publisher.stage(ref))

    def bucket(self, sender: int, version: int, attempt: int, base: int | None, content: int) -> BucketRef:
        old, new = self.contents[self.live_content][1], self.contents[content][1]
        changes = []
        for owner, piece in PIECES:
            if owner == sender:
                rows = slice(piece.first_row, piece.first_row + piece.num_rows)
                changes.append(compare(piece, new[piece.name][rows], None if base is None else old[piece.name][rows]))
        name = f"{sender} of attempt {attempt}, content {content}"

        def allocate(num_bytes: int) -> tuple[str, torch.Tensor]:
            self.payloads[name] = torch.zeros(num_bytes, dtype=torch.uint8)
            return name, self.payloads[name]

        ref, _ = pack_bucket(
            changes, version=version, attempt=attempt, base=base, sender=sender, index=0, allocate=allocate
        )
        return ref

    # The controller's part

    async def restart_lost(self) -> None:
        """Start every group anew that the publisher gave up or that lost a process, and let it catch up."""
        lost = {GROUPS[rank] for rank in set(GROUPS) - self.publisher.serving}
        lost |= {GROUPS[rank.number] for rank in self.ranks.values() if rank.is_dead or rank.is_hung}
        for group in sorted(lost):
            before = -1
            while before < self.network.num_disturbances:  # a fault may be planned for it, too
                before = self.network.num_disturbances
                members = [number for number in GROUPS if GROUPS[number] == group]
                self._start_group(group, members)
                try:
                    await self.publisher.catch_up(members[-1], self._kept())
                    break
                except (SyncRefused, EngineDead) as fault:
                    await self._quiet()
                    if before == self.network.num_disturbances:
                        raise Violation(f"group {group} cannot catch up: {fault}") from fault

    def _start_group(self, group: int, members: list[int]) -> None:
        if group in self._forwards:
            self._forwards[group].cancel()
        for number in members:
            self.ranks[number].is_dead = True
        self.ranks |= {number: self._start_rank(number, 0) for number in members}
        self.publisher.restarted({number: self._receiver(self.ranks[number]) for number in members})

    def _kept(self) -> list[BucketRef]:
        version = self.contents[self.live_content][0]
        return [self.bucket(sender, version, 1, None, self.live_content) for sender in (0, 1)]

    async def _quiet(self) -> None:
        """Until no message was sent for some time, in which forwards went on, and all that are sent arrive."""
        is_quiet = False
        while not is_quiet:
            num_messages = len(self.network.log)
            await asyncio.sleep(3.5 * FORWARD_EVERY_S)  # more than a step of the publisher
            is_quiet = num_messages == len(self.network.log) and not self.network.has_outage

    async def check_at_rest(self) -> None:
        """After some quiet: everybody serves the live version, byte by byte, and nothing refused was ever served."""
        await self._quiet()
        if self._violation is not None:
            raise self._violation
        version, rows = self.contents[self.live_content]
        if self.publisher.live_version != version:
            raise Violation(f"live version: got {self.publisher.live_version}, expected {version}")
        for group in {GROUPS[rank] for rank in self.publisher.serving}:
            if not self._can_run(group):
                if any(r.is_paused for r in self.ranks.values() if GROUPS[r.number] == group and not r.is_dead):
                    raise Violation(f"group {group} stays paused")
                continue
            if any(rank.is_hung for rank in self.ranks.values() if GROUPS[rank.number] == group):
                continue
            got = await asyncio.wait_for(self.forward(group), 4 * FORWARD_EVERY_S)
            if got != version or (group, self.live_content) not in self.served:
                raise Violation(f"group {group} serves version {got}, expected {version}")
        for number in self.publisher.serving:
            rank = self.ranks[number]
            shadow = {name: rank.store.shadow.rows(name) for name in HELD[number]}
            is_idle = rank.participant.state.value == "idle"
            if not is_idle or rank.is_dead or rank.store.shadow.version is None:
                continue  # None: it says itself that it cannot be the base of a delta
            if not all(torch.equal(shadow[name], rows[name]) for name in shadow):
                raise Violation(f"shadow of rank {number} is not version {version}")
        for group, content in self.served:
            if content not in self.allowed and content not in self.given_up.get(group, set()):
                raise Violation(f"group {group} served the refused version {self.contents[content][0]}")
