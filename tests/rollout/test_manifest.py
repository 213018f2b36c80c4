"""Pieces, digests and segments."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import SyncRefused
from rollout.sync import segments
from rollout.sync.delta import compare, pack_bucket
from rollout.sync.manifest import BucketRef, Piece, TensorSpec, check_tiling, cut_piece, digest, plan_buckets
from rollout.sync.segments import SHARED_MEMORY


def piece(name: str, first_row: int, num_rows: int) -> Piece:
    return Piece(name=name, first_row=first_row, num_rows=num_rows)


def test_buckets_keep_order_and_respect_the_limit() -> None:
    specs = [TensorSpec(name=str(i), shape=(n,), dtype="float32") for i, n in enumerate([1, 4, 100, 2, 2, 2])]
    buckets = plan_buckets(specs, bucket_bytes=48)
    assert [s.name for b in buckets for s in b] == [s.name for s in specs]
    assert [[s.name for s in b] for b in buckets] == [["0", "1"], ["2"], ["3", "4", "5"]]


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 200), st.integers(1, 5000), st.randoms())
def test_pieces_cut_to_a_size_tile_their_tensor(num_rows: int, row_bytes: int, bucket_bytes: int, random) -> None:
    pieces = cut_piece(piece("w", 0, num_rows), row_bytes, bucket_bytes)
    assert all(p.num_rows == 1 or p.num_rows * row_bytes <= bucket_bytes for p in pieces)
    random.shuffle(pieces)
    check_tiling({"w": num_rows}, pieces)
    if len(pieces) > 1:
        with pytest.raises(SyncRefused, match="missing"):
            check_tiling({"w": num_rows}, pieces[1:])
        with pytest.raises(SyncRefused, match="sent twice"):
            check_tiling({"w": num_rows}, [*pieces, pieces[0]])


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([piece("a", 0, 4)], "b: rows 0…1 missing"),
        ([piece("a", 0, 4), piece("b", 1, 1)], "b: rows 0…0 missing"),
        ([piece("a", 0, 3), piece("a", 2, 2), piece("b", 0, 2)], "a: rows 2…2 sent twice"),
        ([piece("a", 0, 4), piece("b", 0, 2), piece("c", 0, 1)], "c: not a tensor of the model"),
        ([piece("a", 0, 5), piece("b", 0, 2)], "a: got rows 0…4, expected some of 0…3"),
        ([piece("a", -1, 5), piece("b", 0, 2)], "got rows -1…3"),
        ([piece("a", 0, 4), piece("b", 0, 2), piece("b", 1, 0)], "got rows 1…0"),
        ([], r"a: rows 0…3 missing; b"),
    ],
)
def test_pieces_that_do_not_tile_are_refused(pieces: list[Piece], match: str) -> None:
    with pytest.raises(SyncRefused, match=match):
        check_tiling({"a": 4, "b": 2}, pieces)


def test_a_refusal_names_a_few_faults_and_counts_the_rest() -> None:
    with pytest.raises(SyncRefused, match=r"\(and 4 more\)"):
        check_tiling({str(i): 1 for i in range(9)}, [])


def test_digests_are_of_bytes_in_the_order_of_elements() -> None:
    rows = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert digest(rows) == digest(rows.clone()) == digest(rows.view(torch.uint8))
    assert digest(rows.t()) == digest(rows.t().contiguous()) != digest(rows)
    assert digest(rows.bfloat16()) == digest(rows.bfloat16().view(torch.uint8))
    assert digest(torch.empty(0)) == digest(torch.empty(0, dtype=torch.uint8))
    assert digest(torch.tensor(1.0)) == digest(torch.tensor([1.0]))
    # The reference digest of no bytes at all, from the XXH3 specification: what is computed is what is said.
    assert digest(torch.empty(0)) == "99aa06d3014798d86001c324468d497f"


def bucket_in_memory() -> tuple[BucketRef, torch.Tensor]:
    rows = torch.randint(0, 256, (9, 34), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    change = compare(piece("w", 3, 9), rows, None)
    return pack_bucket([change], version=1, attempt=1, base=None, sender=0, index=0, allocate=segments.create)


def test_segments_round_trip_and_refuse_what_is_missing_or_short() -> None:
    ref, payload = bucket_in_memory()
    try:
        assert BucketRef.from_json(ref.to_json()) == ref
        assert torch.equal(segments.map(ref), payload) and payload.numel() == ref.num_bytes
        with (SHARED_MEMORY / ref.segment).open("r+b") as file:
            file.truncate(ref.num_bytes - 1)
        with pytest.raises(SyncRefused, match=f"got {ref.num_bytes - 1} bytes, expected {ref.num_bytes}"):
            segments.map(ref)
    finally:
        segments.unlink(ref)
    with pytest.raises(SyncRefused, match="segment is missing"):
        segments.map(ref)
    with pytest.raises(SyncRefused, match="got one that is broadcast"):
        segments.map(replace(ref, segment=None))
    segments.unlink(ref)  # twice is fine


def test_an_empty_segment_is_possible_and_a_failed_one_leaves_nothing() -> None:
    before = set(SHARED_MEMORY.glob("longroll-*"))
    name, payload = segments.create(0)
    assert payload.numel() == 0
    segments.unlink(name)
    segments.unlink(None)
    with pytest.raises(OSError):
        segments.create(2**60)  # more than any machine has
    assert set(SHARED_MEMORY.glob("longroll-*")) <= before


def test_segments_of_dead_writers_are_swept_and_those_of_the_living_kept() -> None:
    mine, payload = bucket_in_memory()
    writer = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    stale = SHARED_MEMORY / f"longroll-{writer.stdout.strip()}-0"
    stale.write_bytes(b"x")
    try:
        assert segments.sweep() >= 1
        assert not stale.exists() and torch.equal(segments.map(mine), payload)
    finally:
        segments.unlink(mine)
        stale.unlink(missing_ok=True)
