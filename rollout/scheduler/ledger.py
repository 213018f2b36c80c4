"""Who is owed which groups: handles of clients, finished groups until they are acknowledged.

A group leaves the ledger when the client acknowledges it, so a reply that was lost is delivered
again. A client that is silent for too long loses its unfinished work first and its finished groups
a timeout later. Pure; time is passed in. Knows nothing of how groups come about.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from rollout.errors import UnknownHandle
from rollout.handles import Delivery
from rollout.types import Group


@dataclass(slots=True, kw_only=True)
class Account:
    """One submission of one client. Owned by the ledger."""

    client_id: str
    num_outstanding: int  # groups that have not been acknowledged
    seen_at: float
    is_aborted: bool = False
    finished: dict[str, Group] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """Handles whose client fell silent: their work is to be aborted, or they are gone altogether."""

    to_abort: tuple[str, ...]
    closed: tuple[str, ...]
    num_groups_dropped: int


class Ledger:
    """Owns the accounts of all handles.

    Args:
        client_timeout_s: Longest silence of a client.
    """

    def __init__(self, client_timeout_s: float) -> None:
        self._timeout_s = client_timeout_s
        self._accounts: dict[str, Account] = {}

    @property
    def num_clients(self) -> int:
        return len({account.client_id for account in self._accounts.values()})

    def open(self, handle_id: str, client_id: str, num_groups: int, now: float) -> None:
        self._accounts[handle_id] = Account(client_id=client_id, num_outstanding=num_groups, seen_at=now)
        self.heard_from(client_id, now)

    def touch(self, handle_id: str, now: float) -> None:
        """The client of this handle is alive. Raises UnknownHandle."""
        account = self._account(handle_id)
        account.seen_at = now
        self.heard_from(account.client_id, now)

    def heard_from(self, client_id: str, now: float) -> None:
        """A client called. Its aborted handles still age: it may have stopped reading them."""
        for account in self._accounts.values():
            if account.client_id == client_id and not account.is_aborted:
                account.seen_at = now

    def close(self, handle_id: str) -> None:
        """Nobody is owed anything of this handle any more; harmless for an unknown one."""
        self._accounts.pop(handle_id, None)

    def holds(self, handle_id: str) -> bool:
        """Whether the handle is open."""
        return handle_id in self._accounts

    def mark_aborted(self, handle_id: str) -> None:
        self._account(handle_id).is_aborted = True

    def add(self, handle_id: str, group: Group) -> bool:
        """A group has finished. Returns False when nobody is owed it any more."""
        account = self._accounts.get(handle_id)
        if account is None:
            return False
        account.finished[group.group_id] = group
        return True

    def acknowledge(self, handle_id: str, group_ids: Sequence[str]) -> bool:
        """The client has these groups. Unknown ids are ignored, as after a repeated call.

        Returns:
            True when the client now has everything: the handle is closed.
        """
        account = self._account(handle_id)
        for group_id in group_ids:
            if account.finished.pop(group_id, None) is not None:
                account.num_outstanding -= 1
        if account.num_outstanding == 0:
            del self._accounts[handle_id]
            return True
        return False

    def peek(self, handle_id: str, max_groups: int, skip: Collection[str] = ()) -> Delivery:
        """The next groups to hand out, without those that are skipped; the same again until they are acknowledged."""
        account = self._account(handle_id)
        if not skip:
            groups = tuple(account.finished.values())[:max_groups]
            return Delivery(groups=groups, is_done=len(groups) == account.num_outstanding)
        fresh = [group for group_id, group in account.finished.items() if group_id not in skip]
        is_done = len(account.finished) == account.num_outstanding and len(fresh) <= max_groups
        return Delivery(groups=tuple(fresh[:max_groups]), is_done=is_done)

    def expire(self, now: float) -> Expired:
        """Find the handles of silent clients; to be called now and then."""
        to_abort, closed, num_dropped = [], [], 0
        for handle_id, account in list(self._accounts.items()):
            silence_s = now - account.seen_at
            is_complete = len(account.finished) == account.num_outstanding
            if silence_s > 2 * self._timeout_s and is_complete:
                num_dropped += len(account.finished)
                closed.append(handle_id)
                del self._accounts[handle_id]
            elif silence_s > self._timeout_s and not account.is_aborted:
                account.is_aborted = True
                to_abort.append(handle_id)
        return Expired(to_abort=tuple(to_abort), closed=tuple(closed), num_groups_dropped=num_dropped)

    def _account(self, handle_id: str) -> Account:
        account = self._accounts.get(handle_id)
        if account is None:
            raise UnknownHandle(handle_id)
        return account
