"""Token trees: what a drafter proposes and one pass of the target verifies.

Owns the flat layout of a tree, its limits, and the ancestor mask. Knows nothing of who drafted it, of
attention kernels or of engines.

Row legend. A request that speculates with N nodes is forwarded with R = N + 1 rows: row 0 is the last
accepted token (the root), row i + 1 is node i. `parents[i]` is the *row* of node i's parent, in [0, i]:
parents come first, so every prefix of the nodes is a tree. A row of depth d stands at position base + d
when row 0 stands at base, and sees the whole prefix and the rows on its own path from the root.

Sources: token trees verified in one pass are from SpecInfer (arXiv 2305.09781); at most four tokens in a
layer, and a width that varies from layer to layer, from Clover-2 (arXiv 2408.00264).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rollout.errors import InvalidRequest

MAX_WIDTH = 4
"""Nodes in one layer of a tree, at most."""

_MAX_TOKENS = 2**31

Ints = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTree:
    """A tree of N drafted tokens below a root that is already accepted.

    Args:
        tokens: [N] token ids, each in [0, 2**31).
        parents: [N] rows, parents[i] in [0, i].

    Raises:
        InvalidRequest: The lengths differ, a token is no id, a parent does not come before its child (a
            cycle always has such a parent), two children of one row carry one token, or a layer is wider
            than `MAX_WIDTH`.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray = field(init=False)
    """[R] int32: distance of each row from the root; row 0 has 0."""

    def __post_init__(self) -> None:
        tokens, parents = _as_list("tokens", self.tokens), _as_list("parents", self.parents)
        depths = _depths(tokens, parents)
        _fill(self, np.array(tokens, np.int32), np.array(parents, np.int32), np.array(depths, np.int32))

    @classmethod
    def empty(cls) -> TokenTree:
        """No nodes: the request takes a plain decoding step."""
        return _EMPTY

    @classmethod
    def chain(cls, tokens: Ints) -> TokenTree:
        """One path: the tree of an ordinary draft."""
        return cls.of_lists(tokens, range(len(tokens)))

    @classmethod
    def of_lists(cls, tokens: Ints, parents: Ints) -> TokenTree:
        """The inverse of `to_lists`; raises InvalidRequest as construction does."""
        return cls(tokens=tokens, parents=parents)  # type: ignore[arg-type]  # construction makes arrays of them

    def to_lists(self) -> tuple[list[int], list[int]]:
        """(tokens, parents) as plain lists, for messages."""
        return self.tokens.tolist(), self.parents.tolist()

    @property
    def num_nodes(self) -> int:
        """Drafted tokens, the root not counted."""
        return len(self.tokens)

    @property
    def num_rows(self) -> int:
        """Rows the target is forwarded with."""
        return len(self.tokens) + 1

    @property
    def depth(self) -> int:
        """Layers below the root."""
        return int(self.depths.max())

    def widths(self) -> np.ndarray:
        """[depth] nodes in each layer below the root."""
        return np.bincount(self.depths)[1:]

    def children(self, row: int) -> np.ndarray:
        """Rows of the children of `row`, ascending."""
        return np.flatnonzero(self.parents == row) + 1

    def path(self, row: int) -> list[int]:
        """Rows from row 0 to `row`, both included."""
        rows = [row]
        while row:
            row = int(self.parents[row - 1])
            rows.append(row)
        return rows[::-1]

    def mask(self) -> np.ndarray:
        """[R, R] bool: mask[r, s] where row r sees row s, that is where s is r or an ancestor of r."""
        return tree_masks([self])[0]

    def prefix(self, num_nodes: int) -> TokenTree:
        """The first nodes, at most `num_nodes` of them: what is left when a scheduler trims the draft."""
        if num_nodes < 0:
            raise InvalidRequest("nodes of a prefix", num_nodes, "a number >= 0")
        if num_nodes >= self.num_nodes:
            return self
        # What holds for the whole holds for its prefix: nothing to check again.
        tree = object.__new__(TokenTree)
        _fill(tree, self.tokens[:num_nodes], self.parents[:num_nodes], self.depths[: num_nodes + 1])
        return tree

    def check(self, *, max_width: int, budget: int, vocab_size: int | None = None) -> None:
        """Raise InvalidRequest unless the tree keeps the limits it was asked for.

        Args:
            max_width: Nodes in a layer, at most; in [1, MAX_WIDTH].
            budget: Nodes of the tree, at most; at least 1.
            vocab_size: Ids of the target's vocabulary; a larger token shows a drafter of another one.
        """
        check_limits(max_width=max_width, budget=budget)
        if self.num_nodes > budget:
            raise InvalidRequest("nodes of a draft tree", self.num_nodes, f"at most its budget of {budget}")
        if self.num_nodes and (widest := int(self.widths().max())) > max_width:
            raise InvalidRequest("width of a draft tree", widest, f"at most {max_width} nodes in a layer")
        if vocab_size is not None and self.num_nodes and (largest := int(self.tokens.max())) >= vocab_size:
            raise InvalidRequest("token of a draft tree", largest, f"an id of the target's vocabulary of {vocab_size}")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(token, row of the parent) of every node, parents first."""
        return iter(zip(self.tokens.tolist(), self.parents.tolist(), strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenTree):
            return NotImplemented
        return np.array_equal(self.tokens, other.tokens) and np.array_equal(self.parents, other.parents)

    def __hash__(self) -> int:
        return hash((self.tokens.tobytes(), self.parents.tobytes()))


def check_limits(*, max_width: int, budget: int) -> None:
    """Raise InvalidRequest unless trees of this width and budget may be asked for."""
    if not 1 <= max_width <= MAX_WIDTH:
        raise InvalidRequest("max_width", max_width, f"a number of nodes in a layer in [1, {MAX_WIDTH}]")
    if budget < 1:
        raise InvalidRequest("budget", budget, "at least 1 node")


def tree_masks(trees: Sequence[TokenTree], num_rows: int | None = None) -> np.ndarray:
    """Ancestor masks of a batch.

    Args:
        trees: B trees.
        num_rows: Rows to pad every tree to; the largest tree's by default.

    Returns:
        [B, R, R] bool, as `TokenTree.mask`. A padding row sees itself, so that its softmax is over something.

    Raises:
        InvalidRequest: A tree has more rows than num_rows.
    """
    largest = max((tree.num_rows for tree in trees), default=1)
    rows = largest if num_rows is None else num_rows
    if largest > rows:
        raise InvalidRequest("rows of a tree mask", rows, f"at least {largest}, those of the largest tree")
    # A row's ancestors as the bits of one integer: a few instructions a row, where array operations cost a microsecond.
    stride = -(-rows // 8)
    parts: list[bytes] = []
    for tree in trees:
        seen = [1]
        for parent in tree.parents.tolist():
            seen.append(seen[parent] | 1 << len(seen))
        seen += [1 << row for row in range(len(seen), rows)]
        parts += [bits.to_bytes(stride, "little") for bits in seen]
    packed = np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(len(trees), rows, stride)
    return np.unpackbits(packed, axis=-1, count=rows, bitorder="little").view(bool)


def _fill(tree: TokenTree, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> None:
    object.__setattr__(tree, "tokens", tokens)
    object.__setattr__(tree, "parents", parents)
    object.__setattr__(tree, "depths", depths)


def _as_list(name: str, values: Ints) -> list[int]:
    if isinstance(values, np.ndarray):
        if values.ndim == 1 and values.dtype.kind in "iu":
            return values.tolist()
    elif all(type(value) is int for value in values):
        return list(values)
    raise InvalidRequest(f"{name} of a draft tree", values, "a flat sequence or array of integers")


def _depths(tokens: list[int], parents: list[int]) -> list[int]:
    """Depth of every row, having checked lengths, order, siblings and widths."""
    if len(tokens) != len(parents):
        raise InvalidRequest(
            "draft tree", f"{len(tokens)} tokens and {len(parents)} parents", "as many parents as tokens"
        )
    depths, widths = [0], [0]
    edges: set[tuple[int, int]] = set()
    for node, edge in enumerate(zip(parents, tokens, strict=True)):
        parent, token = edge
        if not 0 <= parent <= node:
            raise InvalidRequest(
                "draft tree",
                f"parent {parent} of node {node} (row {node + 1})",
                f"a row in [0, {node}]: parents come first, and no cycles",
            )
        if not 0 <= token < _MAX_TOKENS:
            raise InvalidRequest("token of a draft tree", token, f"an id in [0, {_MAX_TOKENS})")
        edges.add(edge)
        depth = depths[parent] + 1
        depths.append(depth)
        if depth == len(widths):
            widths.append(0)
        widths[depth] += 1
    if len(edges) < len(tokens):
        [(parent, token), *_] = [
            edge for edge, times in Counter(zip(parents, tokens, strict=True)).items() if times > 1
        ]
        raise InvalidRequest(
            "draft tree", f"token {token} twice below row {parent}", "different tokens among the children of a row"
        )
    if max(widths) > MAX_WIDTH:
        raise InvalidRequest(
            "width of a draft tree",
            f"{max(widths)} nodes at depth {widths.index(max(widths))}",
            f"at most {MAX_WIDTH} in a layer",
        )
    return depths


_EMPTY = TokenTree(tokens=np.empty(0, np.int32), parents=np.empty(0, np.int32))
