"""The division of a model among ranks: a pure function, so random models and no DeepSpeed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.weight_partition import Division, Share, divide, partition_elements
from rollout.config import Int4Config
from rollout.errors import InvalidRequest
from rollout.sync.checkpoint_names import split_parameter
from rollout.sync.encoding import TensorPlan, plan_tensors
from rollout.sync.manifest import TensorSpec, aligned, check_tiling, spec_of

Shapes = list[tuple[str, tuple[int, ...]]]


def plans_of(parameters: Shapes, int4: Int4Config | None) -> dict[str, TensorPlan]:
    tensors = [
        piece
        for name, shape in parameters
        for piece in split_parameter(name, torch.empty(shape, device="meta", dtype=torch.bfloat16))
    ]
    return plan_tensors([spec_of(name, tensor) for name, tensor in tensors], int4)


@st.composite
def models(draw: st.DrawFn) -> tuple[Shapes, Int4Config | None]:
    """A few plain and fused parameters; matrices have input features that every group size divides."""
    group = draw(st.sampled_from([None, 32, 64]))
    shapes: Shapes = []
    for i in range(draw(st.integers(1, 5))):
        num_in = 64 * draw(st.integers(1, 3)) if group else draw(st.integers(1, 150))
        num_out = draw(st.integers(1, 9))
        kind = draw(st.sampled_from(["vector", "matrix", "gate_up", "down"]))
        if kind == "vector":
            shapes.append((f"layers.{i}.norm.weight", (draw(st.integers(1, 300)),)))
        elif kind == "matrix":
            shapes.append((f"layers.{i}.q_proj.weight", (num_out, num_in)))
        elif kind == "gate_up":
            shapes.append((f"layers.{i}.mlp.experts.gate_up_proj", (draw(st.integers(1, 4)), 2 * num_out, num_in)))
        else:
            shapes.append((f"layers.{i}.mlp.experts.down_proj", (draw(st.integers(1, 4)), num_out, num_in)))
    return shapes, None if group is None else Int4Config(group_size=group, skip=())


def shares_of(division: Division) -> list[tuple[int, Share]]:
    return [(rank, share) for rank, buckets in enumerate(division.buckets) for b in buckets for share in b]


@settings(max_examples=300, deadline=None)
@given(models(), st.integers(1, 8), st.integers(1, 4000))
def test_every_row_has_one_sender_which_holds_or_borrows_its_elements(model, num_ranks, bucket_bytes):
    shapes, int4 = model
    plans = plans_of(shapes, int4)
    division = divide(shapes, plans, num_ranks, bucket_bytes, is_partitioned=True)
    check_tiling({name: plan.num_rows for name, plan in plans.items()}, [piece for _, piece in division.pieces])

    numel = {name: math.prod(shape) for name, shape in shapes}
    held = {
        (rank, name): set(range(rank * size, min((rank + 1) * size, n)))
        for name, n in numel.items()
        for size in [partition_elements(n, num_ranks)]
        for rank in range(num_ranks)
    }
    for loan in division.loans:
        elements = set(range(loan.start, loan.stop))
        assert elements and elements <= held[loan.lender, loan.parameter]
        held[loan.borrower, loan.parameter] |= elements
    covered: dict[str, list[int]] = {name: [0] * n for name, n in numel.items()}
    for rank, share in shares_of(division):
        assert set(range(share.start, share.stop)) <= held[rank, share.parameter]
        for i in range(share.start, share.stop):
            covered[share.parameter][i] += 1
        size = partition_elements(numel[share.parameter], num_ranks)
        assert rank * size <= share.start < (rank + 1) * size
    assert all(count == 1 for counts in covered.values() for count in counts)
    for rank, buckets in enumerate(division.buckets):
        for bucket in buckets:
            num_bytes = sum(aligned(s.piece.num_rows * plans[s.piece.name].row_bytes) for s in bucket)
            limit = max(aligned(bucket_bytes), aligned(max(plans[s.piece.name].row_bytes for s in bucket)))
            assert 0 < num_bytes <= limit, f"rank {rank}"


@settings(max_examples=100, deadline=None)
@given(models(), st.integers(1, 8))
def test_elements_of_a_share_are_those_of_its_rows(model, num_ranks):
    shapes, int4 = model
    plans = plans_of(shapes, int4)
    flat = {name: torch.arange(math.prod(shape)).view(shape) for name, shape in shapes}
    tensors = {n: t.reshape(-1) for name, p in flat.items() for n, t in split_parameter(name, p)}
    for _, share in shares_of(divide(shapes, plans, num_ranks, 1000, is_partitioned=False)):
        plan = plans[share.piece.name]
        first = share.piece.first_row * plan.row_elements
        want = tensors[share.piece.name][first : first + share.piece.num_rows * plan.row_elements]
        assert torch.equal(flat[share.parameter].view(-1)[share.start : share.stop], want)


def test_whole_groups_need_no_loans_and_whole_parameters_never_do():
    shapes = [("layers.0.mlp.experts.gate_up_proj", (8, 384, 128)), ("norm.weight", (128,))]
    plans = plans_of(shapes, Int4Config(group_size=64))
    assert divide(shapes, plans, 2, 2**20, is_partitioned=True).loans == ()
    loans = divide(shapes, plans, 7, 2**20, is_partitioned=True).loans
    assert loans and sum(loan.stop - loan.start for loan in loans) < 7 * 2 * 64
    assert divide(shapes, plans, 7, 2**20, is_partitioned=False).loans == ()


def test_what_every_rank_holds_whole_is_sent_once_and_never_lent():
    shapes = [("norm.weight", (130,)), ("layers.0.q_proj.weight", (5, 96))]
    beside = [("draft.trust_by_depth", (5, 2)), ("draft.mlp.experts.down_proj", (2, 3, 100))]  # no parts of them
    plans = plans_of(shapes, None) | plan_tensors(
        [TensorSpec(name=n, shape=s, dtype="float32") for n, s in beside], None
    )
    division = divide(shapes, plans, 3, 400, is_partitioned=True, replicated=beside)
    check_tiling({name: plan.num_rows for name, plan in plans.items()}, [piece for _, piece in division.pieces])
    assert {share.parameter for _, share in shares_of(division)} == plans.keys()
    assert division.loans == divide(shapes, plans_of(shapes, None), 3, 400, is_partitioned=True).loans != ()
    ranks = {rank for rank, share in shares_of(division) if share.parameter == "draft.mlp.experts.down_proj"}
    assert ranks == {0, 1, 2}, "the ranks share the work"


def test_other_tensors_than_are_served_are_refused():
    shapes = [("a.weight", (4, 64))]
    plans = plans_of([("a.weight", (4, 64)), ("b.weight", (4, 64))], None)
    with pytest.raises(InvalidRequest, match=r"b\.weight"):
        divide(shapes, plans, 2, 100, is_partitioned=True)
