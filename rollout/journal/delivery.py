"""Who has which finished group, who has learned from it, and when it may be forgotten.

            lease_until passes, or release()
          ┌──────────────────────────────────┐
          ▼                                  │
      FINISHED ───────── lease() ──────► LEASED ─── acknowledge(checkpoint) ──► ACKNOWLEDGED ─── compact ──► key only
          └────────────────── acknowledge(checkpoint) ─────────────────────────────▲

An acknowledged group is never handed out again, and its row stays for ever: a submission of the same id finds it.
Pure over statements: transactions and the clock are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rollout.errors import InvalidRequest
from rollout.journal.encoding import plain_text
from rollout.journal.errors import JournalConflict
from rollout.journal.reading import in_list
from rollout.journal.schema import Statements

COMPACT_GROUPS = 16  # groups whose tokens are dropped in one transaction, which others wait for


def lease(
    database: Statements, run_id: str, consumer: str, max_groups: int, lease_s: float, now: float
) -> list[tuple[int, str]]:
    """Hand finished groups to a consumer until now + lease_s, those that finished first before others.

    Returns:
        Row and id of each; all finished, unacknowledged, and without another unexpired lease.

    Raises:
        InvalidRequest: No groups, or no time, were asked for.
    """
    if max_groups < 1:
        raise InvalidRequest("lease max_groups", max_groups, "an integer ≥ 1")
    if not lease_s > 0 or not math.isfinite(lease_s):
        raise InvalidRequest("lease lease_s", lease_s, "a finite number > 0")
    plain_text("consumer", consumer)
    rows = database.execute(
        "SELECT group_key, group_id FROM groups WHERE run_id = ? AND finish_order IS NOT NULL "
        "AND checkpoint_name IS NULL AND (lease_until IS NULL OR lease_until <= ?) ORDER BY finish_order LIMIT ?",
        (run_id, float(now), max_groups),
    )
    for group_key, _ in rows:
        database.execute(
            "UPDATE groups SET lease_consumer = ?, lease_until = ? WHERE group_key = ?",
            (consumer, float(now + lease_s), group_key),
        )
    return [(group_key, group_id) for group_key, group_id in rows]


def acknowledge(database: Statements, run_id: str, group_ids: Sequence[str], checkpoint: str, now: float) -> list[str]:
    """Note that a checkpoint has learned from groups. All of them, or none.

    Returns:
        Those that were not acknowledged before; the others keep their first checkpoint.

    Raises:
        InvalidRequest: A group was never submitted.
        JournalConflict: A group is not finished.
    """
    plain_text("checkpoint", checkpoint)
    fresh: dict[str, int] = {}
    for group_id in group_ids:
        rows = database.execute(
            "SELECT group_key, finish_order, checkpoint_name FROM groups WHERE run_id = ? AND group_id = ?",
            (run_id, plain_text("group id", group_id)),
        )
        if not rows:
            raise InvalidRequest("acknowledged group", f"{group_id} of run {run_id}", "one that was submitted")
        group_key, finish_order, known = rows[0]
        if finish_order is None:
            raise JournalConflict(
                f"acknowledged group {group_id} of run {run_id}: got a pending one, expected a finished"
            )
        if known is None:
            fresh[group_id] = group_key
    for group_key in fresh.values():
        database.execute(
            "UPDATE groups SET checkpoint_name = ?, acknowledged_at = ?, lease_consumer = NULL, lease_until = NULL "
            "WHERE group_key = ?",
            (checkpoint, float(now), group_key),
        )
    return list(fresh)


def release(database: Statements, run_id: str, consumer: str) -> int:
    """End the leases of a consumer, which has lost what it had. Returns how many."""
    rows = database.execute(
        "SELECT group_key FROM groups WHERE run_id = ? AND finish_order IS NOT NULL AND checkpoint_name IS NULL "
        "AND lease_consumer = ?",
        (run_id, plain_text("consumer", consumer)),
    )
    for (group_key,) in rows:
        database.execute(
            "UPDATE groups SET lease_consumer = NULL, lease_until = NULL WHERE group_key = ?", (group_key,)
        )
    return len(rows)


def compact_some(database: Statements, before: float) -> int:
    """Drop tokens, prompts and metadata of some groups acknowledged at `before` or earlier. Returns how many."""
    rows = database.execute(
        "SELECT group_key FROM groups WHERE acknowledged_at IS NOT NULL AND is_compacted = 0 AND acknowledged_at <= ? "
        "ORDER BY acknowledged_at LIMIT ?",
        (float(before), COMPACT_GROUPS),
    )
    keys = [row[0] for row in rows]
    if keys:
        chosen = in_list(keys)
        database.execute(f"DELETE FROM chunks WHERE group_key IN {chosen}", tuple(keys))
        database.execute(
            f"UPDATE trajectories SET outcome = NULL, digest = NULL WHERE group_key IN {chosen}", tuple(keys)
        )
        database.execute(
            f"UPDATE groups SET is_compacted = 1, prompt_tokens = ?, prompt = ? WHERE group_key IN {chosen}",
            (b"", '{"metadata":{},"prompt_id":""}', *keys),
        )
    return len(keys)
