"""Shadows: staging in place, digests, undo, and what is kept for it."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import SyncRefused
from rollout.sync import segments
from rollout.sync.delta import compare, pack_bucket
from rollout.sync.encoding import Encoding, TensorPlan
from rollout.sync.manifest import BucketRef, Piece
from rollout.sync.shadow import Shadow

PLANS = {
    "packed": TensorPlan(name="packed", shape=(16, 128), encoding=Encoding.INT4, row_elements=64, dtype="bfloat16"),
    "plain": TensorPlan(name="plain", shape=(700,), encoding=Encoding.PLAIN, row_elements=64, dtype="bfloat16"),
    "other": TensorPlan(name="other", shape=(64,), encoding=Encoding.PLAIN, row_elements=64, dtype="bfloat16"),
}
HELD = ("packed", "plain")


def random_rows(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, (plan.num_rows, plan.row_bytes), dtype=torch.uint8, generator=generator)
        for name, plan in PLANS.items()
    }


def shadow_of(rows: dict[str, torch.Tensor], version: int) -> Shadow:
    return Shadow(PLANS, {name: rows[name].clone() for name in HELD}, version)


def bucket(
    rows: dict[str, torch.Tensor], pieces: list[Piece], old: dict[str, torch.Tensor] | None, **names: int
) -> tuple[BucketRef, torch.Tensor]:
    changes = []
    for piece in pieces:
        part = slice(piece.first_row, piece.first_row + piece.num_rows)
        changes.append(compare(piece, rows[piece.name][part], None if old is None else old[piece.name][part]))
    fields = {"version": 2, "attempt": 1, "base": None if old is None else 1, "sender": 0, "index": 0} | names
    return pack_bucket(changes, **fields)


def whole(name: str) -> Piece:
    return Piece(name=name, first_row=0, num_rows=PLANS[name].num_rows)


def is_at(shadow: Shadow, rows: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(shadow.rows(name), rows[name]) for name in HELD)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.lists(st.integers(1, 31), unique=True, max_size=6), st.booleans(), st.randoms())
def test_any_cut_in_any_order_makes_the_new_version_and_is_undone(seed, cuts, is_delta, random) -> None:
    old, new = random_rows(seed), random_rows(seed + 1)
    keep = torch.rand(32, generator=torch.Generator().manual_seed(seed)) < 0.7
    new["packed"][keep] = old["packed"][keep]
    pieces = [Piece(name="plain", first_row=0, num_rows=11), whole("other")]
    edges = itertools.pairwise([0, *sorted(cuts), 32])
    pieces += [Piece(name="packed", first_row=first, num_rows=end - first) for first, end in edges]
    random.shuffle(pieces)
    shadow = shadow_of(old, version=1)
    shadow.begin(1 if is_delta else None)
    for index, piece in enumerate(pieces):
        if piece.name in HELD:
            assert shadow.missing() != []
        shadow.stage(*bucket(new, [piece], old if is_delta else None, index=index))
    assert shadow.missing() == [] and is_at(shadow, new)
    differing = {name for name in HELD if not torch.equal(old[name], new[name])}
    assert shadow.changed == (differing if is_delta else set(HELD))
    num_undo_bytes = sum(before.rows.numel() for _, before in shadow._undo)
    most = sum(int((old[name] != new[name]).any(dim=1).sum()) * PLANS[name].row_bytes for name in HELD)
    assert num_undo_bytes <= most * is_delta, "more rows were kept than changed"
    shadow.drop()
    assert shadow.missing() != [] and not shadow.changed
    if is_delta:
        assert is_at(shadow, old) and shadow.version == 1
        return
    assert shadow.version is None
    with pytest.raises(SyncRefused, match="expected nothing whole"):
        shadow.begin(1)
    shadow.begin(None)
    shadow.stage(*bucket(old, [whole("plain"), whole("packed")], None, attempt=2))
    shadow.commit(3)
    assert is_at(shadow, old) and shadow.version == 3


@pytest.mark.parametrize("num_bytes", [1, 2**18, 2**18 + 1, 3 * 2**18])
def test_a_payload_in_shared_memory_is_written_block_by_block(num_bytes) -> None:
    plan = TensorPlan(name="t", shape=(num_bytes,), encoding=Encoding.PLAIN, row_elements=1, dtype="uint8")
    rows = torch.randint(0, 256, (num_bytes, 1), dtype=torch.uint8)
    piece = Piece(name="t", first_row=0, num_rows=num_bytes)
    names = {"version": 1, "attempt": 1, "base": None, "sender": 0, "index": 0}
    ref, _ = pack_bucket([compare(piece, rows, None)], allocate=segments.create, **names)
    shadow = Shadow({"t": plan}, {"t": torch.zeros_like(rows)}, 0)
    try:
        opened = segments.Segment(ref)
        shadow.stage(ref, opened)
        assert torch.equal(shadow.rows("t"), rows)
        shadow.drop()
        os.truncate(segments.SHARED_MEMORY / ref.segment, num_bytes - 1)
        with pytest.raises(SyncRefused, match="fewer bytes"):
            shadow.stage(ref, opened)
    finally:
        segments.unlink(ref)


def test_a_full_version_with_a_mask_is_refused() -> None:
    old, new = random_rows(0), random_rows(1)
    new["packed"][:30] = old["packed"][:30]
    ref, payload = bucket(new, [whole("packed")], old)
    with pytest.raises(SyncRefused, match="expected all 32"):
        shadow_of(old, version=1).stage(replace(ref, base=None), payload)


def test_a_committed_version_is_the_base_of_the_next() -> None:
    first, second, third = (random_rows(seed) for seed in range(3))
    shadow = shadow_of(first, version=1)
    shadow.stage(*bucket(second, [whole("packed"), whole("plain")], first))
    shadow.commit(2)
    shadow.begin(2)
    shadow.drop()
    assert is_at(shadow, second) and shadow.version == 2 and shadow.missing() != []
    with pytest.raises(SyncRefused, match="delta against version 1, expected 2"):
        shadow.stage(*bucket(third, [whole("packed")], first, version=3))
    shadow.stage(*bucket(third, [whole("packed"), whole("plain")], second, version=3, base=2))
    shadow.commit(3)
    assert is_at(shadow, third)


def test_a_wrong_byte_is_found_by_the_digest_and_undone() -> None:
    old, new = random_rows(0), random_rows(1)
    for is_delta in (False, True):
        shadow = shadow_of(old, version=1)
        ref, payload = bucket(new, [whole("packed"), whole("plain")], old if is_delta else None)
        payload[ref.entries[1].rows_offset + 5] ^= 1
        with pytest.raises(SyncRefused, match="plain rows 0…10: got digest"):
            shadow.stage(ref, payload)
        shadow.drop()
        assert is_at(shadow, old) if is_delta else shadow.version is None


def test_a_delta_on_other_bytes_is_found_by_the_digest_of_all_rows() -> None:
    old, new = random_rows(0), random_rows(1)
    new["packed"][:30] = old["packed"][:30]
    other = {name: rows.clone() for name, rows in old.items()}
    other["packed"][4, 4] ^= 1  # a row that does not travel
    shadow = shadow_of(other, version=1)
    with pytest.raises(SyncRefused, match="got digest"):
        shadow.stage(*bucket(new, [whole("packed")], old))


def test_rows_out_of_range_or_staged_twice_are_refused() -> None:
    old, new = random_rows(0), random_rows(1)
    shadow = shadow_of(old, version=1)
    ref, payload = bucket(new, [whole("plain")], None)
    for wrong in (
        {"first_row": 1},
        {"first_row": -1},
        {"num_rows": 12, "num_changed": 12},
        {"num_rows": 0, "num_changed": 0},
    ):
        with pytest.raises(SyncRefused, match=r"expected some of 0…10"):
            shadow.stage(replace(ref, entries=(replace(ref.entries[0], **wrong),)), payload)
    shadow.stage(ref, payload)
    again, payload = bucket(new, [Piece(name="plain", first_row=10, num_rows=1)], None, index=1)
    with pytest.raises(SyncRefused, match="staged before"):
        shadow.stage(again, payload)
    shadow.drop()
    shadow.stage(*bucket(new, [Piece(name="plain", first_row=10, num_rows=1)], None))
    missing = shadow.missing()
    assert any("plain: rows 0…9 missing" in words for words in missing) and len(missing) == 2


def test_only_names_held_are_staged_and_shadows_are_compared_by_the_common_ones() -> None:
    old, new = random_rows(0), random_rows(1)
    shadow = shadow_of(old, version=1)
    shadow.stage(*bucket(new, [whole("other")], None))
    assert not shadow.changed and is_at(shadow, old) and shadow.names == HELD
    same = Shadow(PLANS, {"plain": old["plain"].clone(), "other": old["other"].clone()}, version=1)
    assert shadow.common_digest(["plain"]) == same.common_digest(["plain"])
    assert shadow.common_digest(["plain", "packed"]) == shadow.common_digest(["packed", "plain"])
    same.rows("plain")[10, 127] ^= 1
    assert shadow.common_digest(["plain"]) != same.common_digest(["plain"])


def test_rows_that_are_not_as_planned_are_an_error_of_the_caller() -> None:
    rows = random_rows(0)["plain"]
    for wrong in (rows[:-1], rows[:, :-1], rows.to(torch.int16), rows.t().contiguous().t()):
        with pytest.raises(ValueError, match="rows of plain"):
            Shadow(PLANS, {"plain": wrong}, version=0)
