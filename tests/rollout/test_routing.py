"""Packed routing: exact, of the promised size, and refused when damaged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import InvalidRequest, RoutingBroken
from rollout.routing import Routing, RoutingRef, covers, id_dtype, num_id_bits, pack, rows_of, unpack
from rollout.types import ChunkResult, FinishReason, Trajectory, VersionSpan

HEADER_BYTES = len(pack(Routing(first_token=0, num_experts=8, ids=np.zeros((0, 1, 1), dtype=np.uint8))))


def drawn(num_tokens: int, num_layers: int, top_k: int, num_experts: int, seed: int = 0, first: int = 0) -> Routing:
    ids = np.random.default_rng(seed).integers(0, num_experts, (num_tokens, num_layers, top_k))
    return Routing(first_token=first, num_experts=num_experts, ids=ids.astype(id_dtype(num_experts)))


@given(
    num_tokens=st.integers(0, 17),
    num_layers=st.integers(1, 5),
    top_k=st.integers(1, 9),
    num_experts=st.one_of(st.sampled_from([1, 2, 3, 128, 129, 255, 256, 257, 65535, 65536]), st.integers(1, 65536)),
    first=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 2**31),
)
def test_what_was_packed_comes_out(num_tokens, num_layers, top_k, num_experts, first, seed):
    routing = drawn(num_tokens, num_layers, top_k, num_experts, seed, first)
    if routing.ids.size:
        routing.ids.reshape(-1)[-1] = num_experts - 1  # the largest id uses every bit
    blob = pack(routing)
    got = unpack(blob)
    assert (got.first_token, got.num_experts, got.ids.dtype) == (first, num_experts, routing.ids.dtype)
    assert got.ids.shape == routing.ids.shape and (got.ids == routing.ids).all()
    groups = -(-routing.ids.size // 8)
    assert len(blob) - HEADER_BYTES == groups * num_id_bits(num_experts)


def test_bits_follow_the_number_of_experts():
    assert [num_id_bits(n) for n in (1, 2, 3, 8, 128, 129, 256, 257, 512)] == [1, 1, 2, 3, 7, 8, 8, 9, 9]


def test_a_token_of_the_target_model_takes_658_bytes():
    """94 layers × 8 experts × 7 bits, below the 752 bytes of one byte an id."""
    assert len(pack(drawn(10, 94, 8, 128))) - HEADER_BYTES == 10 * 658


def test_damage_is_found_wherever_it_is():
    blob = pack(drawn(5, 3, 2, 128))
    for place in range(len(blob)):
        broken = bytearray(blob)
        broken[place] ^= 0x10
        with pytest.raises(RoutingBroken):
            unpack(bytes(broken))
    for length in (0, 3, HEADER_BYTES - 1, HEADER_BYTES, len(blob) - 1):
        with pytest.raises(RoutingBroken, match="got"):
            unpack(blob[:length])
    with pytest.raises(RoutingBroken, match="got"):
        unpack(blob + b"\0")


def test_what_cannot_be_packed_is_refused():
    good = drawn(2, 2, 2, 8)
    with pytest.raises(InvalidRequest, match="expert id"):
        pack(Routing(first_token=0, num_experts=8, ids=good.ids + 8))
    with pytest.raises(InvalidRequest, match="expert ids"):
        pack(Routing(first_token=0, num_experts=8, ids=good.ids.astype(np.int64)))
    with pytest.raises(InvalidRequest, match="expert ids"):
        pack(Routing(first_token=0, num_experts=8, ids=good.ids[0]))
    with pytest.raises(InvalidRequest, match="number of experts"):
        num_id_bits(65537)


def reference(first: int, num_tokens: int) -> RoutingRef:
    return RoutingRef(ref=None, num_bytes=0, first_token=first, num_tokens=num_tokens)


def test_a_reference_takes_its_rows_only():
    routing = drawn(6, 2, 2, 8, first=4)
    assert (rows_of(pack(routing), reference(4, 5)) == routing.ids[:5]).all()
    for wrong in (reference(3, 5), reference(4, 7)):
        with pytest.raises(RoutingBroken, match="expected"):
            rows_of(pack(routing), wrong)


def test_chunks_must_tile_a_trajectory():
    assert covers([reference(0, 5), reference(5, 2)], 7)
    assert covers([], 0)
    assert not covers([], 3)
    assert not covers([reference(0, 5)], 7)  # the end is missing
    assert not covers([reference(5, 2)], 7)  # the start
    assert not covers([reference(0, 4), reference(5, 2)], 7)  # a gap
    assert not covers([reference(0, 6), reference(5, 2)], 7)  # an overlap


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6))
def test_chunks_of_a_trajectory_tile_it_unless_one_was_not_captured(chunks):
    trajectory = Trajectory(group_id="g", sample_index=0, seed=0, prompt_token_ids=(1, 2, 3))
    is_whole = True
    for num_tokens, is_captured in chunks:
        done = len(trajectory.token_ids)
        began_with = 3 + done
        first = 0 if done == 0 else began_with - 1
        routing = reference(first, began_with + num_tokens - 1 - first)
        is_whole &= is_captured or num_tokens == 0
        trajectory.append(
            ChunkResult(
                trajectory_id="g/0",
                token_ids=(7,) * num_tokens,
                logprobs=(0.0,) * num_tokens,
                spans=(VersionSpan(version=0, start=0, stop=num_tokens),) if num_tokens else (),
                finish_reason=FinishReason.ABORT,
                shard=0,
                routing=routing if is_captured else None,
            )
        )
    if trajectory.token_ids:
        assert covers(trajectory.routed_experts, 3 + len(trajectory.token_ids) - 1) == is_whole
    else:
        assert trajectory.routed_experts == ()
