"""The worker's side of a publication: what it has promised, and when its weights may flip.

    IDLE ──begin──► STAGING ──verify──► VERIFIED ──arm──► ARMED ──settle(agreed) or flip──► IDLE (new version)
     ▲                 │  a bucket refused │                 │
     └─────────────────┴──── drop, or the begin of a later attempt (old version) ◄──────────┘

Atomicity inside an expert-parallel group, whose ranks compute every forward together: each forward of
every rank begins with an all-reduce that carries `vote()`; every rank computes the same minimum and
calls `settle(minimum)` before it computes anything. A version becomes live only at a minimum that
equals it, so in the forward in which every rank of the group was armed. A rank may flip between
forwards through `flip`, which is sent only once all ranks of its group have acknowledged `arm`: from
then on it votes the new version, hence any other rank flips before the next forward that involves it.

Messages carry the number of their publication attempt. Attempts increase; what belongs to an attempt
that is over, or older than the open one, is refused as a message from the past and changes nothing.
Doubled messages of the open attempt, or of the one that flipped last, are answered again.

Pure and thread-free. Callers handle messages one at a time, and hold a lock from `vote` to the end of
the forward, which `begin`, `arm`, `flip` and `drop` wait for. `stage` and `verify` need not: while they
have anything to do this worker is not armed, so they move neither its vote nor what it serves.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import torch

from rollout.errors import EngineDead, SyncRefused
from rollout.sync.manifest import BucketRef, some_of
from rollout.sync.segments import Segment


class Store(Protocol):
    """A worker's shadow and its live weights. Called under the participant's locks."""

    def begin(self, base: int | None) -> None:
        """A version is going to be staged, as changes against `base`, or in full. May refuse."""

    def stage(self, ref: BucketRef, payload: torch.Tensor | Segment) -> None:
        """Take in a bucket beside the live weights. Raises SyncRefused."""

    def missing(self) -> list[str]:
        """Which rows have not been staged, in words."""

    def digest(self) -> str:
        """Over the staged bytes of the tensors that every shard holds."""

    def prepare(self) -> None:
        """Build what `flip` copies. Whatever can fail in a flip must fail here."""

    def flip(self, version: int) -> None:
        """Copy what was prepared into the live weights. A raise is taken for the end of the engine."""

    def undo(self) -> None:
        """Forget what was staged and prepared; the live weights were never touched."""


class Phase(str, Enum):
    """See the module's diagram."""

    IDLE = "idle"
    STAGING = "staging"
    VERIFIED = "verified"
    ARMED = "armed"
    BROKEN = "broken"


class Participant:
    """One worker's part in publications, one after the other.

    Args:
        store: What is staged into and flipped.
        live_version: Version of the weights that the worker loaded.
    """

    def __init__(self, store: Store, live_version: int) -> None:
        self._store = store
        self._live_version = live_version
        self._phase = Phase.IDLE
        self._attempt = 0  # the highest that began here
        self._over = 0  # the highest that was dropped or flipped, or never will begin
        self._flipped_attempt: int | None = None  # the last one that flipped
        self._version = live_version  # of the open attempt, while there is one
        self._base: int | None = None
        self._digest: str | None = None
        self._staged: dict[tuple[int, int], BucketRef] = {}
        self._is_voting = False

    @property
    def live_version(self) -> int:
        return self._live_version

    @property
    def armed_version(self) -> int | None:
        return self._version if self._phase is Phase.ARMED else None

    @property
    def state(self) -> Phase:
        return self._phase

    def begin(self, attempt: int, version: int, base: int | None) -> None:
        """Open an attempt; an older one that was left open is undone.

        Args:
            attempt: Above every earlier one.
            version: Above the live version.
            base: The live version, or None if every row will be sent.

        Raises:
            SyncRefused: From the past, a version that is not newer, or a base that is not live here.
        """
        self._check_between_forwards("begin")
        if attempt == self._attempt and attempt > self._over:
            if (version, base) != (self._version, self._base):
                got = f"version {version} on {base}"
                raise SyncRefused(f"attempt {attempt}: got {got}, expected version {self._version} on {self._base}")
            return
        self._check_is_later(attempt, "begin")
        self._end_open_attempt()
        if version <= self._live_version:
            raise SyncRefused(f"version: got {version}, expected one above the live version {self._live_version}")
        if base is not None and base != self._live_version:
            raise SyncRefused(f"base: got {base}, expected the live version {self._live_version}; send everything")
        self._store.begin(base)
        self._attempt, self._version, self._base = attempt, version, base
        self._phase, self._digest, self._staged = Phase.STAGING, None, {}

    def has_staged(self, ref: BucketRef) -> bool:
        """Whether this very bucket was taken in already, so that its payload need not be opened again."""
        return self._is_open(ref.attempt) and self._staged.get((ref.sender, ref.index)) == ref

    def stage(self, ref: BucketRef, payload: torch.Tensor | Segment) -> None:
        """Take in a bucket; the same one again is harmless.

        Raises:
            SyncRefused: It does not belong here (nothing changes), or the store refuses it (the attempt is over).
        """
        self._expect(ref.attempt, "stage", Phase.STAGING, Phase.VERIFIED, Phase.ARMED)
        if self.has_staged(ref):
            return
        if (ref.version, ref.base) != (self._version, self._base):
            raise SyncRefused(
                f"{ref}: got version {ref.version} on {ref.base}, expected version {self._version} on {self._base}"
            )
        if self._phase is not Phase.STAGING:
            raise SyncRefused(f"{ref}: got a bucket of a version that is {self._phase.value}")
        if (ref.sender, ref.index) in self._staged:
            raise SyncRefused(f"{ref}: got another bucket of that number before")
        try:
            self._store.stage(ref, payload)
        except Exception as fault:
            raise self._refusal(fault, str(ref)) from fault
        self._staged[ref.sender, ref.index] = ref

    def verify(self, attempt: int) -> str:
        """Check that everything is here, and prepare the flip.

        Returns:
            Digest of the tensors that every shard holds, for comparison between shards.

        Raises:
            SyncRefused: Rows are missing (more buckets may come), or the flip cannot be prepared (the
                attempt is over).
        """
        if attempt == self._flipped_attempt and self._digest is not None and self._phase is Phase.IDLE:
            return self._digest
        self._expect(attempt, "verify", Phase.STAGING, Phase.VERIFIED, Phase.ARMED)
        if self._digest is not None:
            return self._digest
        missing = self._store.missing()
        if missing:
            raise SyncRefused(f"version {self._version}: never staged: {some_of(missing)}")
        try:
            digest = self._store.digest()
            self._store.prepare()
        except Exception as fault:
            raise self._refusal(fault, f"version {self._version}") from fault
        self._phase, self._digest = Phase.VERIFIED, digest
        return digest

    def arm(self, attempt: int) -> None:
        """Promise to flip as soon as the whole group agrees. Raises SyncRefused unless it was verified."""
        self._check_not_broken()
        if attempt == self._flipped_attempt:
            return
        self._expect(attempt, "arm", Phase.VERIFIED, Phase.ARMED)
        self._phase = Phase.ARMED

    def vote(self) -> int:
        """What this rank puts into the all-reduce of a forward; `settle` must follow under the same lock."""
        self._check_not_broken()
        self._is_voting = True
        return self._version if self._phase is Phase.ARMED else self._live_version

    def settle(self, agreed: int) -> bool:
        """Serve the version that the group agreed on.

        Args:
            agreed: Minimum of the votes over the ranks of the group.

        Returns:
            Whether the weights flipped.

        Raises:
            EngineDead: The group cannot serve one version (a rank that is not up to date has joined it);
                no forward may be computed.
        """
        self._is_voting = False
        if agreed == self._live_version:
            return False
        if agreed != self.armed_version:
            self._phase = Phase.BROKEN
            raise EngineDead(
                f"vote: the group agreed on version {agreed}, expected the live version {self._live_version} "
                f"or the armed one ({self.armed_version})"
            )
        self._flip()
        return True

    def flip(self, attempt: int) -> int:
        """Flip between forwards; every rank of the group must have acknowledged `arm`. Returns the live version.

        Raises:
            SyncRefused: It is not armed.
            EngineDead: The live weights are half-written.
        """
        self._check_not_broken()
        if attempt == self._flipped_attempt:
            return self._live_version
        self._check_between_forwards("flip")
        self._expect(attempt, "flip", Phase.ARMED)
        self._flip()
        return self._live_version

    def drop(self, attempt: int) -> int:
        """Give up an attempt, or make sure that it never begins here.

        Returns:
            The live version afterwards. It is the version of the attempt if that had flipped, which stands.
        """
        self._check_not_broken()
        if attempt > self._over:
            self._check_between_forwards("drop")
            if self._attempt <= attempt:
                self._end_open_attempt()
            self._over = attempt
        return self._live_version

    def _is_open(self, attempt: int) -> bool:
        return attempt == self._attempt and attempt > self._over

    def _check_is_later(self, attempt: int, what: str) -> None:
        newest = max(self._attempt, self._over)
        if attempt <= newest:
            raise SyncRefused(f"{what}: a message from the past: got attempt {attempt}, expected one above {newest}")

    def _expect(self, attempt: int, what: str, *phases: Phase) -> None:
        self._check_not_broken()
        if not self._is_open(attempt):
            if attempt <= max(self._attempt, self._over):
                now = f"attempt {self._attempt}" if self._is_open(self._attempt) else "the next attempt"
                raise SyncRefused(f"{what}: a message from the past: got attempt {attempt}, expected {now}")
            raise SyncRefused(f"{what} of attempt {attempt}: expected begin() first")
        if self._phase not in phases:
            expected = " or ".join(phase.value for phase in phases)
            raise SyncRefused(f"{what} of attempt {attempt}: got it while {self._phase.value}, expected {expected}")

    def _check_not_broken(self) -> None:
        if self._phase is Phase.BROKEN:
            raise EngineDead("this worker failed inside a flip; its engine must be restarted")

    def _check_between_forwards(self, what: str) -> None:
        self._check_not_broken()
        if self._is_voting:
            raise SyncRefused(f"{what}: got it between the vote and the flip of a forward, expected it before or after")

    def _end_open_attempt(self) -> None:
        if self._is_open(self._attempt):
            self._over = self._attempt
            self._phase, self._staged = Phase.IDLE, {}
            self._store.undo()

    def _refusal(self, fault: Exception, what: str) -> SyncRefused:
        """The attempt is over; nobody knows how much of it was taken in."""
        self._end_open_attempt()
        return fault if isinstance(fault, SyncRefused) else SyncRefused(f"{what}: {type(fault).__name__}: {fault}")

    def _flip(self) -> None:
        try:
            self._store.flip(self._version)
        except Exception as fault:
            self._phase = Phase.BROKEN
            raise EngineDead(f"version {self._version}: failed inside the flip: {fault}") from fault
        self._live_version, self._flipped_attempt, self._over = self._version, self._attempt, self._attempt
        self._phase, self._staged = Phase.IDLE, {}
