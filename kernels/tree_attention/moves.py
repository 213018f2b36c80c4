"""Which slots' keys and values move where after an accepted path: the plan of a compaction.

Owns the slots; knows no tensor of a cache, so one plan serves all layers.

The accepted rows 0 = r0 < r1 < ... of a request lie in slots base + r0, base + r1, ... and must lie in base,
base + 1, ...: the k-th comes from the right or stays, and never from before a later one's target. Taken in order,
no move overwrites what a later one reads.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMoves:
    """n moves of B requests; a slot is block * block_size + offset. Made by ``accepted_moves``.

    Attributes:
        sources: [n] int64 slots, those of one request in the order of their positions.
        targets: [n] int64 slots; none twice.
        start_loc: [B + 1] int64, moves start_loc[b] .. start_loc[b + 1] - 1 are request b's.
    """

    sources: torch.Tensor
    targets: torch.Tensor
    start_loc: torch.Tensor

    def to(self, device: torch.device | str) -> "SlotMoves":
        """Return the moves on a device; copies from the host do not wait."""
        return SlotMoves(
            sources=self.sources.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            start_loc=self.start_loc.to(device, non_blocking=True),
        )


@torch.no_grad()
def accepted_moves(
    *, rows: torch.Tensor, counts: torch.Tensor, bases: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> SlotMoves:
    """Plan the moves of a step's accepted paths; a row that lies where it must is left out.

    Args:
        rows: [m] integer on the CPU, the accepted rows of each request, request after request, row 0 included:
            rising within a request.
        counts: [B] integer, accepted rows of each request; 0: none of it moves.
        bases: [B] integer, each root's position.
        block_table: [B, max_blocks] integer on the CPU.
        block_size: Tokens of a block.

    Raises:
        ValueError: Rows do not rise from 0, or do not fit counts or the block table.
    """
    rows, counts, bases = rows.long(), counts.long(), bases.long()
    num_requests = len(counts)
    if counts.sum() != len(rows) or len(bases) != num_requests or len(block_table) != num_requests:
        raise ValueError(
            f"counts: got {counts.tolist()}, expected {len(rows)} in all, one for each of {len(bases)} bases and of"
            f" {len(block_table)} rows of the block table"
        )
    owner = torch.repeat_interleave(counts)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[owner]
    is_first = place == 0
    if (rows[is_first] != 0).any() or (rows.diff()[~is_first[1:]] <= 0).any():
        raise ValueError(f"rows: got {rows.tolist()}, expected to rise from 0 in each of {counts.tolist()} rows")
    is_moved = rows != place
    owner, place, rows = owner[is_moved], place[is_moved], rows[is_moved]
    base = bases[owner]
    limit = block_table.shape[1] * block_size
    last = int((base + rows).max()) if len(rows) else -1
    if last >= limit:
        raise ValueError(f"rows: got position {last}, expected below {limit} (max_blocks * block_size)")

    def slots(positions: torch.Tensor) -> torch.Tensor:
        return block_table[owner, positions // block_size].long() * block_size + positions % block_size

    num_moves = torch.zeros(num_requests, dtype=torch.int64).index_add_(0, owner, torch.ones_like(owner))
    return SlotMoves(
        sources=slots(base + rows),
        targets=slots(base + place),
        start_loc=torch.nn.functional.pad(num_moves.cumsum(0), (1, 0)),
    )
