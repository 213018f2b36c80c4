"""Packing and applying changed rows: any rows, any change, any damage to the payload."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import SyncRefused
from rollout.sync.delta import apply, changed_rows, compare, pack_bucket
from rollout.sync.manifest import BucketRef, Piece, aligned, digest

ROW_BYTES = st.sampled_from([1, 3, 4, 7, 8, 18, 34, 66, 128])
"""Less than a word, no whole number of words, INT4 groups of 32, 64 and 128, and whole words."""


def random_rows(num_rows: int, row_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_rows, row_bytes), dtype=torch.uint8, generator=generator)


@st.composite
def versions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Old and new rows; few of them, most of them or any of them differ, some in one byte only."""
    num_rows, row_bytes = draw(st.integers(1, 200)), draw(ROW_BYTES)
    seed, share = draw(st.integers(0, 2**16)), draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
    old = random_rows(num_rows, row_bytes, seed)
    generator = np.random.default_rng(seed)
    new = old.clone()
    for row in np.flatnonzero(generator.random(num_rows) < share):
        new[row, generator.integers(row_bytes)] ^= int(generator.integers(1, 256))
    return old, new


def pack(old: torch.Tensor | None, new: torch.Tensor, base: int | None) -> tuple[BucketRef, torch.Tensor]:
    change = compare(Piece(name="w", first_row=0, num_rows=new.shape[0]), new, old)
    return pack_bucket([change], version=2, attempt=1, base=base, sender=0, index=0)


@settings(deadline=None)
@given(versions())
def test_changed_rows_are_those_that_differ_in_any_byte(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    old, new = pair
    expected = [i for i in range(len(old)) if not torch.equal(old[i], new[i])]
    assert changed_rows(old, new).tolist() == expected


def test_rows_at_odd_addresses_are_compared_and_applied() -> None:
    flat = random_rows(1, 34 * 50 + 1, seed=0).view(-1)
    old, new = flat[1:].view(50, 34), flat[1:].view(50, 34).clone()
    new[[3, 17, 49], [0, 33, 5]] ^= 1
    assert changed_rows(old, new).tolist() == [3, 17, 49]
    ref, payload = pack(old, new, base=1)
    apply(ref.entries[0], payload, old)
    assert torch.equal(old, new)


@settings(deadline=None)
@given(versions())
def test_a_delta_brings_the_old_rows_to_the_new_ones_and_back(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    old, new = pair
    num_rows, row_bytes = old.shape
    ref, payload = pack(old, new, base=1)
    entry, num_changed = ref.entries[0], len(changed_rows(old, new))
    assert entry.num_changed == num_changed and entry.digest == digest(new)
    num_mask_bytes = -(-num_rows // 8) if 0 < num_changed < num_rows else 0
    assert ref.num_bytes == payload.numel() == aligned(num_mask_bytes) + aligned(num_changed * row_bytes)
    target = old.clone()
    before = apply(entry, payload, target)
    assert torch.equal(target, new)
    assert before.rows.shape[0] == num_changed, "more was kept than what changed"
    before.restore(target)
    assert torch.equal(target, old)


@settings(deadline=None)
@given(versions())
def test_a_full_piece_needs_no_base_and_is_undone_by_keeping_what_differs(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    old, new = pair
    ref, payload = pack(None, new, base=None)
    assert ref.entries[0].mask_offset is None and ref.entries[0].num_changed == new.shape[0]
    target = old.clone()
    before = apply(ref.entries[0], payload, target)
    assert torch.equal(target, new) and before.rows.shape[0] == len(changed_rows(old, new))
    before.restore(target)
    assert torch.equal(target, old)


@settings(deadline=None)
@given(versions(), st.integers(1, 4000))
def test_a_truncated_payload_is_refused_and_nothing_is_written(
    pair: tuple[torch.Tensor, torch.Tensor], num_missing: int
) -> None:
    old, new = pair
    ref, payload = pack(old, new, base=1)
    entry = ref.entries[0]
    num_used = entry.rows_offset + entry.num_changed * old.shape[1]
    if entry.num_changed == 0:
        return
    target = old.clone()
    with pytest.raises(SyncRefused, match="expected them inside a payload"):
        apply(entry, payload[: max(0, num_used - num_missing)], target)
    assert torch.equal(target, old)


def test_descriptions_that_do_not_fit_are_refused() -> None:
    old = random_rows(20, 34, seed=1)
    new = old.clone()
    new[[2, 5, 19]] = 255 - new[[2, 5, 19]]
    ref, payload = pack(old, new, base=1)
    entry = ref.entries[0]
    beyond = payload.clone()
    beyond[2] |= 1 << 7  # row 23 of 20
    for wrong, given_payload, match in [
        (replace(entry, num_changed=2), payload, "mask of 3 rows"),
        (replace(entry, num_changed=4), payload, "mask of 3 rows"),
        (replace(entry, num_changed=4), beyond, "up to row 23, expected 4 of 20"),
        (replace(entry, mask_offset=None), payload, "no mask"),
        (replace(entry, mask_offset=payload.numel()), payload, "mask at bytes"),
        (replace(entry, mask_offset=-1), payload, "mask at bytes"),
        (replace(entry, rows_offset=payload.numel() - 3 * 34 + 1), payload, "rows at bytes"),
        (replace(entry, rows_offset=-16), payload, "rows at bytes"),
        (replace(entry, num_changed=-1, mask_offset=None, num_rows=20), payload, "no mask"),
    ]:
        target = old.clone()
        with pytest.raises(SyncRefused, match=match):
            apply(wrong, given_payload, target)
        assert torch.equal(target, old)


def test_a_bucket_packs_many_pieces_aligned_into_a_buffer_of_the_caller() -> None:
    news = {name: random_rows(n, 34, seed=n) for name, n in (("a", 5), ("b", 33), ("c", 8))}
    olds = {"a": None, "b": news["b"].clone(), "c": news["c"].clone()}
    olds["b"][7] ^= 1
    changes = [compare(Piece(name=n, first_row=0, num_rows=len(new)), new, olds[n]) for n, new in news.items()]
    buffers: list[torch.Tensor] = []

    def allocate(num_bytes: int) -> tuple[str, torch.Tensor]:
        buffers.append(torch.full((num_bytes,), 255, dtype=torch.uint8))
        return "segment", buffers[0]

    ref, payload = pack_bucket(changes, version=9, attempt=4, base=8, sender=2, index=1, allocate=allocate)
    assert payload is buffers[0] and ref.segment == "segment"
    assert [e.num_changed for e in ref.entries] == [5, 1, 0]
    assert all(e.rows_offset % 16 == 0 and (e.mask_offset or 0) % 16 == 0 for e in ref.entries)
    for entry in ref.entries:
        target = news[entry.name].clone() if olds[entry.name] is None else olds[entry.name].clone()
        apply(entry, payload, target)
        assert torch.equal(target, news[entry.name])
    assert BucketRef.from_json(ref.to_json()) == ref


def test_what_a_sender_gets_wrong_is_refused() -> None:
    rows = random_rows(4, 8, seed=0)
    piece = Piece(name="w", first_row=0, num_rows=4)
    with pytest.raises(ValueError, match="expected uint8"):
        compare(piece, rows[:3], None)
    with pytest.raises(ValueError, match="same shape"):
        compare(piece, rows, rows[:3])
    with pytest.raises(SyncRefused, match="expected a base"):
        pack(rows, rows.clone(), base=None)
