"""A layer of INT4 experts in Triton: routing, both products with the SwiGLU between them, and the sum.

Owns the kernels and launches of ``int4_moe``, whose contract is the dispatcher's; the arguments have been
checked there. The product of a tile is ``triton_tile.py``'s.

An assignment is one pair (token, choice), numbered token * k + choice. Assignments to local experts are
sorted by expert, and each expert's run is cut into blocks of one tile's tokens. Nothing waits for the
device: grids follow from upper bounds, and programs walk over the blocks that there are. Each assignment's
result is stored before a last kernel weighs and adds them in the order of a token's choices, so the sum is
the same each time, which atomic additions would not make it.

Shape legend: A = T k assignments, E local experts, H hidden size, I width of an expert.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.int4.triton_tile import Tile, choose_tile, tile_product

_MAX_ONE_PROGRAM = 4096
"""Assignments that one program sorts; it takes a few microseconds, where a dozen launches would take more."""
_ROUTE_ELEMENTS = 8192
"""Assignments times experts that the sorting program compares at a time."""
_PROGRAMS_PER_MULTIPROCESSOR = 4
_INTERPRETED_PROGRAMS = 3
"""Programs of a product in the interpreter: few, so that one walks over several tiles."""
_ADD_TILE = 1024
_MAX_TOKENS = 16_384
"""Tokens taken at a time: bounds the memory of intermediate results, which have room for every assignment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where the products find their tokens.

    Attributes:
        order: int32 [A], local assignments sorted by expert, stably; what follows them is undefined.
        blocks: int32 [max_blocks, 3], each the expert, and the first and the end of a block's places in order.
        num_blocks: int32 [1].
    """

    order: torch.Tensor
    blocks: torch.Tensor
    num_blocks: torch.Tensor


@triton.jit
def _local_experts(ids_ptr, map_ptr, assignments, mask, num_experts, HAS_MAP: tl.constexpr):
    """Return the local experts of assignments, num_experts for those that have none."""
    expert = tl.load(ids_ptr + assignments, mask=mask, other=-1).to(tl.int32)
    if HAS_MAP:
        expert = tl.load(map_ptr + expert, mask=mask, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)


@triton.jit
def _route_kernel(
    ids_ptr,
    map_ptr,
    order_ptr,
    blocks_ptr,
    num_blocks_ptr,
    num_assignments,
    num_experts,
    max_blocks,
    HAS_MAP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sort the assignments by counting and cut them into blocks, in one program."""
    experts = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_assignments, CHUNK):
        assignments = start + tl.arange(0, CHUNK)
        local = _local_experts(ids_ptr, map_ptr, assignments, assignments < num_assignments, num_experts, HAS_MAP)
        counts += tl.sum((local[:, None] == experts[None, :]).to(tl.int32), 0)
    counts = tl.where(experts < num_experts, counts, 0)
    ends = tl.cumsum(counts, 0)
    places = ends - counts

    num_blocks = (counts + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    block_ends = tl.cumsum(num_blocks, 0)
    tl.store(num_blocks_ptr, tl.sum(num_blocks, 0))
    for start in range(0, max_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        is_mine = (block[:, None] < block_ends[None, :]) & (block[:, None] >= (block_ends - num_blocks)[None, :])
        first = places[None, :] + (block[:, None] - (block_ends - num_blocks)[None, :]) * BLOCK_TOKENS
        entry = blocks_ptr + block * 3
        tl.store(entry, tl.sum(tl.where(is_mine, experts[None, :], 0), 1), mask=block < max_blocks)
        tl.store(entry + 1, tl.sum(tl.where(is_mine, first, 0), 1), mask=block < max_blocks)
        tl.store(entry + 2, tl.sum(tl.where(is_mine, ends[None, :], 0), 1), mask=block < max_blocks)

    for start in range(0, num_assignments, CHUNK):
        assignments = start + tl.arange(0, CHUNK)
        local = _local_experts(ids_ptr, map_ptr, assignments, assignments < num_assignments, num_experts, HAS_MAP)
        is_mine = (local[:, None] == experts[None, :]) & (local < num_experts)[:, None]
        rank = tl.cumsum(is_mine.to(tl.int32), 0) - 1
        place = tl.sum(tl.where(is_mine, rank + places[None, :], 0), 1)
        tl.store(order_ptr + place, assignments, mask=local < num_experts)
        places += tl.sum(is_mine.to(tl.int32), 0)


@triton.jit
def _expert_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    y_ptr,
    order_ptr,
    blocks_ptr,
    num_blocks_ptr,
    x_stride,
    num_out,
    top_k,
    NUM_GROUPS: tl.constexpr,
    IS_GATED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
):
    """Multiply blocks of tokens with their expert's weight; y [A, num_out].

    Gated: a tile is as many rows of the gate as of the up projection, x has a row a token, and y is
    silu(gate) * up. Else x has a row an assignment.
    """
    TILE_OUT: tl.constexpr = ROWS // 2 if IS_GATED else ROWS
    num_row_tiles = (num_out + TILE_OUT - 1) // TILE_OUT
    num_tiles = tl.load(num_blocks_ptr) * num_row_tiles
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        entry = blocks_ptr + (tile // num_row_tiles) * 3
        expert = tl.load(entry).to(tl.int64)
        place = tl.load(entry + 1) + tl.arange(0, TOKENS)
        token_mask = place < tl.load(entry + 2)
        assignment = tl.load(order_ptr + place, mask=token_mask, other=0)
        first_out = (tile % num_row_tiles) * TILE_OUT
        row = tl.arange(0, ROWS)
        if IS_GATED:
            out = first_out + row % TILE_OUT
            weight_row = expert * (2 * num_out) + out + tl.where(row < TILE_OUT, 0, num_out)
            x_row = (assignment // top_k).to(tl.int64)
        else:
            out = first_out + row
            weight_row = expert * num_out + out
            x_row = assignment.to(tl.int64)
        sums = tile_product(
            packed_ptr,
            scale_ptr,
            weight_row,
            out < num_out,
            x_ptr,
            x_row,
            token_mask,
            x_stride,
            0,
            (NUM_GROUPS * GROUP + STEP - 1) // STEP,
            NUM_GROUPS,
            GROUP,
            ROWS,
            TOKENS,
            STEP,
            SCALE_SUMS,
        )
        if IS_GATED:
            gate, up = tl.split(tl.permute(tl.reshape(sums, [2, TILE_OUT, TOKENS]), [1, 2, 0]))
            sums = gate / (1.0 + tl.exp(-gate)) * up
        out = first_out + tl.arange(0, TILE_OUT)
        target = y_ptr + assignment.to(tl.int64)[None, :] * num_out + out[:, None]
        tl.store(target, sums.to(y_ptr.dtype.element_ty), mask=(out < num_out)[:, None] & token_mask[None, :])


@triton.jit
def _add_choices_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    output_ptr,
    hidden,
    top_k,
    num_experts,
    HAS_MAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add one token's weighted local results in float32; what no expert here has made is not read."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros([TILE], tl.float32)
    for choice in range(0, top_k):
        assignment = token * top_k + choice
        local = _local_experts(ids_ptr, map_ptr, assignment, assignment >= 0, num_experts, HAS_MAP)
        if local < num_experts:
            y = tl.load(y_ptr + assignment * hidden + column, mask=column < hidden, other=0.0)
            sums += y.to(tl.float32) * tl.load(weights_ptr + assignment)
    tl.store(output_ptr + token * hidden + column, sums.to(output_ptr.dtype.element_ty), mask=column < hidden)


def route(ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, block_tokens: int) -> Routing:
    """Sort assignments by local expert and cut each expert's into blocks, without waiting for the device.

    Args:
        ids: [T, k] int32 or int64, on any device.
        expert_map: [experts] integer or None.
        num_experts: E.
        block_tokens: Assignments in a block, at most.
    """
    num_assignments = ids.numel()
    # A block that is not full is its expert's last.
    max_blocks = num_assignments // block_tokens + min(num_assignments, num_experts)
    if num_assignments > _MAX_ONE_PROGRAM:
        return _route_by_sort(ids, expert_map, num_experts, block_tokens, max_blocks)
    order = torch.empty(num_assignments, dtype=torch.int32, device=ids.device)
    blocks = torch.empty(max_blocks, 3, dtype=torch.int32, device=ids.device)
    num_blocks = torch.empty(1, dtype=torch.int32, device=ids.device)
    experts = triton.next_power_of_2(num_experts)
    chunk = max(_ROUTE_ELEMENTS // experts, 16)
    _route_kernel[(1,)](
        ids,
        expert_map,
        order,
        blocks,
        num_blocks,
        num_assignments,
        num_experts,
        max_blocks,
        HAS_MAP=expert_map is not None,
        BLOCK_TOKENS=block_tokens,
        EXPERTS=experts,
        CHUNK=min(chunk, triton.next_power_of_2(num_assignments)),
        BLOCKS=min(chunk, triton.next_power_of_2(max_blocks)),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return Routing(order=order, blocks=blocks, num_blocks=num_blocks)


def _route_by_sort(
    ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, block_tokens: int, max_blocks: int
) -> Routing:
    local = ids.reshape(-1) if expert_map is None else expert_map[ids.reshape(-1)]
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    local, order = local.sort(stable=True)
    bounds = torch.searchsorted(local, torch.arange(num_experts + 1, device=ids.device, dtype=local.dtype))
    num_blocks = (bounds.diff() + block_tokens - 1) // block_tokens
    block_ends = num_blocks.cumsum(0)
    block = torch.arange(max_blocks, device=ids.device)
    expert = torch.searchsorted(block_ends, block, right=True).clamp_(max=num_experts - 1)
    first = bounds[expert] + (block - (block_ends - num_blocks)[expert]) * block_tokens
    blocks = torch.stack([expert, first, bounds[expert + 1]], dim=1)
    return Routing(order=order.int(), blocks=blocks.int(), num_blocks=block_ends[-1:].int())


def int4_moe_triton(
    x: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``int4_moe`` on the device, without waiting for it."""
    num_experts, num_tokens = w2[0].shape[0], x.shape[0]
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if output.numel() == 0 or num_experts == 0:
        return output.zero_()
    topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
    expert_map = None if expert_map is None else expert_map.contiguous()
    with torch.cuda.device_of(x):
        for start in range(0, num_tokens, _MAX_TOKENS):
            rows = slice(start, start + _MAX_TOKENS)
            _add_experts(x[rows], w13, w2, topk_weights[rows], topk_ids[rows], expert_map, group_size, output[rows])
    return output


def _add_experts(
    x: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    group_size: int,
    output: torch.Tensor,
) -> None:
    """Write the layer's result for some of the tokens into output."""
    num_experts, hidden, half_width = w2[0].shape
    num_tokens, top_k = topk_ids.shape
    num_assignments = topk_ids.numel()
    tile = choose_tile(num_assignments / (num_experts if expert_map is None else expert_map.numel()))
    routing = route(topk_ids, expert_map, num_experts, tile.tokens)
    activated = torch.empty(num_assignments, 2 * half_width, dtype=x.dtype, device=x.device)
    results = torch.empty(num_assignments, hidden, dtype=x.dtype, device=x.device)
    _launch_experts(x, w13, activated, routing, tile, group_size, top_k=top_k, is_gated=True)
    _launch_experts(activated, w2, results, routing, tile, group_size, top_k=top_k, is_gated=False)
    _add_choices_kernel[(num_tokens, triton.cdiv(hidden, _ADD_TILE))](
        results,
        topk_weights,
        topk_ids,
        expert_map,
        output,
        hidden,
        top_k,
        num_experts,
        HAS_MAP=expert_map is not None,
        TILE=_ADD_TILE,
        enable_fp_fusion=True,
    )


def _launch_experts(
    x: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor],
    y: torch.Tensor,
    routing: Routing,
    tile: Tile,
    group_size: int,
    *,
    top_k: int,
    is_gated: bool,
) -> None:
    num_out = y.shape[1]
    tile_out = tile.rows // 2 if is_gated else tile.rows
    max_tiles = len(routing.blocks) * triton.cdiv(num_out, tile_out)
    num_programs = _INTERPRETED_PROGRAMS
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        num_programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    _expert_kernel[(min(max_tiles, num_programs),)](
        x,
        *weight,
        y,
        routing.order,
        routing.blocks,
        routing.num_blocks,
        x.stride(0),
        num_out,
        top_k,
        NUM_GROUPS=weight[1].shape[-1],
        IS_GATED=is_gated,
        GROUP=group_size,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        STEP=tile.step,
        SCALE_SUMS=tile.scale_sums,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
