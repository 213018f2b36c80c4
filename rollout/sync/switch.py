"""A decided version brought to the groups of a fleet: arm → flip, and what became of each group.

From here on no fault can undo the publication for a group that took it, so every message is sent until
it is answered, and a group whose ranks do not answer is given up rather than guessed about. Why the
ranks of one group can never compute a forward under two versions, whatever is lost here, is said in
`rollout.sync.participant`. Knows nothing of staging, or of what the fleet does with a lost group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

from rollout.errors import EngineDead
from rollout.sync.receivers import Receivers, failed, insist, said


class Fate(str, Enum):
    """What a group serves after the switch: the new version, the old one, or nobody knows."""

    NEW = "new"
    OLD = "old"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one group, and why if not all went well (empty otherwise)."""

    fate: Fate
    reason: str = ""


async def switch_groups(
    receivers: Receivers, groups: Mapping[int, int], attempt: int, version: int, timeout_s: float
) -> dict[int, Outcome]:
    """Flip every group on its own, all of them at once. Never raises.

    Args:
        receivers: Shards that have verified the attempt.
        groups: Group of every rank.
        attempt: Which attempt.
        version: What it brings.
        timeout_s: For each of the steps arm, flip and drop.
    """
    members: dict[int, dict] = {}
    for rank, receiver in receivers.items():
        members.setdefault(groups[rank], {})[rank] = receiver
    outcomes = await asyncio.gather(*(_switch(m, attempt, version, timeout_s) for m in members.values()))
    return dict(zip(members, outcomes, strict=True))


def reasons(outcomes: Mapping[int, Outcome]) -> str:
    """What became of every group, for an error message."""
    return "; ".join(f"group {group}: {outcome.reason or outcome.fate.value}" for group, outcome in outcomes.items())


async def _switch(receivers: Receivers, attempt: int, version: int, timeout_s: float) -> Outcome:
    armed = failed(await insist(receivers, lambda r: r.arm(attempt), timeout_s))
    if not armed:
        return await _flip(receivers, attempt, version, timeout_s)
    reason = f"arming failed: {said(armed, timeout_s)}"
    if _dead(armed.values()):
        return Outcome(fate=Fate.LOST, reason=reason)
    # Some rank may not be armed: whichever rank drops first settles that the vote never passes.
    answers = await insist(receivers, lambda r: r.drop(attempt), timeout_s)
    faults = failed(answers)
    flipped = {rank: answer >= version for rank, answer in answers.items() if rank not in faults}
    if not flipped or _dead(faults.values()) or len(set(flipped.values())) > 1:
        return Outcome(fate=Fate.LOST, reason=f"{reason}; dropping: {said(faults, timeout_s) or flipped}")
    if not any(flipped.values()):
        return Outcome(fate=Fate.OLD, reason=reason)
    # The vote did pass, so every rank was armed; those that did not answer flip at their next forward.
    return await _flip({rank: receivers[rank] for rank in faults}, attempt, version, timeout_s)


async def _flip(receivers: Receivers, attempt: int, version: int, timeout_s: float) -> Outcome:
    answers = await insist(receivers, lambda r: r.flip(attempt), timeout_s)
    faults = failed(answers)
    if faults:
        return Outcome(fate=Fate.LOST, reason=f"flipping failed: {said(faults, timeout_s)}")
    behind = [rank for rank, live in answers.items() if live != version]
    if behind:
        return Outcome(fate=Fate.LOST, reason=f"flipping: shard {behind[0]} serves version {answers[behind[0]]}")
    return Outcome(fate=Fate.NEW)


def _dead(faults: Collection[BaseException]) -> bool:
    return any(isinstance(fault, EngineDead) for fault in faults)
