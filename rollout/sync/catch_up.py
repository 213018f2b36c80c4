"""Bringing shards that were restarted, or left behind, to the live version before they serve.

A publication of their own: the full buckets that senders keep of the live version, staged, verified
and flipped on the ranks of one group together. Knows nothing of the rest of the fleet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rollout.errors import EngineDead, SyncRefused
from rollout.sync.manifest import BucketRef, check_tiling
from rollout.sync.receivers import Call, Receivers, ask, failed, said
from rollout.sync.switch import Fate, switch_groups


async def behind_live(receivers: Receivers, version: int, timeout_s: float) -> tuple[int, ...]:
    """Which of these shards serve an older version.

    Raises:
        SyncRefused: A shard does not answer, or serves a newer one (it must be restarted).
        EngineDead: A shard is gone.
    """
    live = await _all("asking for the live version", receivers, lambda r: r.live_version(), timeout_s)
    ahead = [rank for rank, got in live.items() if got > version]
    if ahead:
        got = f"version {live[ahead[0]]} on shard {ahead[0]}"
        raise SyncRefused(f"catching up: got {got}, expected {version} or an older one")
    return tuple(rank for rank, got in live.items() if got < version)


async def bring_up(
    receivers: Receivers,
    refs: Sequence[BucketRef],
    *,
    attempt: int,
    version: int,
    num_rows: Mapping[str, int],
    expected_digest: str | None,
    timeout_s: float,
) -> None:
    """Stage and flip the live version on shards of one group.

    Args:
        receivers: Its ranks that are behind; they serve nobody.
        refs: Full buckets of the version, of whatever attempt.
        attempt: Above every earlier one.
        version: The live version.
        num_rows: Rows of every tensor of the model.
        expected_digest: What the fleet answered to `verify` of this version; None if it never did.
        timeout_s: Limit of each step.

    Raises:
        SyncRefused: The buckets do not make up the version, or a step failed; the group stays behind.
        EngineDead: A shard is gone, or what it serves is not known.
    """
    wrong = next((ref for ref in refs if ref.version != version or ref.base is not None or ref.segment is None), None)
    if wrong is not None or not refs:
        got = f"{wrong} on base {wrong.base} in segment {wrong.segment}" if wrong else "no buckets"
        raise SyncRefused(f"catching up: got {got}, expected full buckets of version {version} in shared memory")
    check_tiling(num_rows, (entry.piece for ref in refs for entry in ref.entries))
    try:
        await _all("begin", receivers, lambda r: r.begin(attempt, version, None), timeout_s)
        for ref in refs:
            await _stage(receivers, replace(ref, attempt=attempt), timeout_s)
        digests = await _all("verify", receivers, lambda r: r.verify(attempt), timeout_s)
        if len({*digests.values(), expected_digest or min(digests.values())}) > 1:
            raise SyncRefused(f"catching up: got digests {digests}, expected all of them to be {expected_digest}")
    except SyncRefused:
        await ask(receivers, lambda r: r.drop(attempt), timeout_s)
        raise
    outcomes = await switch_groups(receivers, dict.fromkeys(receivers, 0), attempt, version, timeout_s)
    outcome = outcomes[0]
    if outcome.fate is Fate.LOST:
        raise EngineDead(f"catching up: shards {sorted(receivers)} are lost: {outcome.reason}")
    if outcome.fate is Fate.OLD:
        raise SyncRefused(f"catching up: shards {sorted(receivers)} stay behind: {outcome.reason}")


async def _stage(receivers: Receivers, ref: BucketRef, timeout_s: float) -> None:
    await _all("stage", receivers, lambda r: r.stage(ref), timeout_s)


async def _all(step: str, receivers: Receivers, call: Call, timeout_s: float) -> dict[int, Any]:
    answers = await ask(receivers, call, timeout_s)
    faults = failed(answers)
    if faults:
        kind = EngineDead if any(isinstance(f, EngineDead) for f in faults.values()) else SyncRefused
        raise kind(f"catching up: {step} failed: {said(faults, timeout_s)}")
    return answers
