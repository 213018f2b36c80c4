"""The token trees of one step, flat: which row sees which.

Owns their shape; knows neither tokens nor caches. One batch serves all layers of a step.

A request with N nodes, N >= 0, has N + 1 rows: row 0 is the root, the request's last accepted token, row i + 1 is
node i. A parent comes before its children. With base = seq_len - (N + 1), the root's position, row i's key and
value lie in slot base + i of the sequence, and its position is base + depth:

    parents 0 0 0 1 1 2      row    0 1 2 3 4 5        row 4 sees the prefix, 0, 1 and 4
                             depth  0 1 1 2 2 2

    root 0 -- 1 -- 3
         |    `--- 4
         `--- 2 -- 5
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBatch:
    """B requests with t rows in all, R of them at most in one request. Made by ``tree_batch``.

    Attributes:
        query_start_loc: [B + 1] int64, rows query_start_loc[b] .. query_start_loc[b + 1] - 1 are request b's.
        counts: [B] int64 rows of each request, at least 1.
        depths: [t] int64 steps from the root.
        mask: [t, R] bool, column j: the row sees row j of its own request. A row sees itself.
    """

    query_start_loc: torch.Tensor
    counts: torch.Tensor
    depths: torch.Tensor
    mask: torch.Tensor

    @property
    def num_requests(self) -> int:
        return len(self.counts)

    @property
    def num_rows(self) -> int:
        return self.mask.shape[0]

    @property
    def max_rows(self) -> int:
        return self.mask.shape[1]

    def to(self, device: torch.device | str) -> "TreeBatch":
        """Return the batch on a device; copies from the host do not wait."""
        return TreeBatch(
            query_start_loc=self.query_start_loc.to(device, non_blocking=True),
            counts=self.counts.to(device, non_blocking=True),
            depths=self.depths.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
        )


@torch.no_grad()
def tree_batch(parents: torch.Tensor, counts: torch.Tensor) -> TreeBatch:
    """Lay out the trees of a step.

    Args:
        parents: [t] integer on the CPU, request after request: the row of its request that is each row's parent;
            0 for row 0, the root.
        counts: [B] integer, rows of each request, at least 1.

    Raises:
        ValueError: A shape or dtype is wrong, or a parent does not come before its child.
    """
    for name, tensor in (("parents", parents), ("counts", counts)):
        if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64) or tensor.device.type != "cpu":
            raise ValueError(
                f"{name}: got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, expected one"
                " dimension of integers on the CPU"
            )
    parents, counts = parents.long(), counts.long()
    query_start_loc = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if (counts < 1).any() or query_start_loc[-1] != len(parents):
        raise ValueError(f"counts: got {counts.tolist()}, expected at least 1 each and {len(parents)} in all")
    starts = query_start_loc[:-1].repeat_interleave(counts)
    rows = torch.arange(len(parents)) - starts
    # The root is its own parent, all others' come before them.
    is_wrong = (parents < 0) | (parents > (rows - 1).clamp(min=0))
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"parents: got {int(parents[row])} for row {int(rows[row])} of a request, expected a row before it"
        )
    max_rows = int(counts.max()) if len(counts) else 1
    mask = rows.unsqueeze(1) == torch.arange(max_rows)
    # Pointer doubling: after k turns a row has its 2**k nearest ancestors, itself included.
    ancestor = starts + parents
    for _ in range((max_rows - 1).bit_length()):
        mask = mask | mask[ancestor]
        ancestor = ancestor[ancestor]
    return TreeBatch(query_start_loc=query_start_loc, counts=counts, depths=mask.sum(1) - 1, mask=mask)
