"""What drafts for one sequence: the interface, and any causal language model as a drafter.

Owns the layer-by-layer drafting of a tree with a model of its own KV cache. Knows nothing of the target beyond what
`propose` is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from rollout.speculation.cached_lm import CachedLM
from rollout.speculation.coupling import KeyedSampling
from rollout.speculation.growth import ScoredTree, TreeGrowth


@runtime_checkable
class Drafter(Protocol):
    """Proposes what follows. It may propose anything: a bad draft costs time, never a token.

    Attributes:
        vocab_size: Ids it was made for, checked against the target's; None if it only repeats tokens it was given.
        needs_hidden: It reads the target's hidden states.
    """

    vocab_size: int | None
    needs_hidden: bool

    def propose(
        self,
        context: Sequence[int],
        hidden: torch.Tensor | None,
        *,
        sampling: KeyedSampling,
        max_width: int,
        max_depth: int,
        budget: int,
    ) -> ScoredTree:
        """A tree below the last token of the context.

        Args:
            context: Prompt and output so far; the last token is the root and has not been forwarded by the target.
            hidden: [n, H] the target's states, after its final norm, at the tokens accepted since the last call (at
                the first call: at the whole prompt); the last of them is that of context[-2]. None unless needed.
            sampling: How the target will draw; token d layers below the root is drawn at position
                len(context) - 1 + d.
            max_width: Nodes in one layer, at most.
            max_depth: Layers, at most; at least 1.
            budget: Nodes, at most.
        """
        ...


class CausalDrafter:
    """Drafts with a causal language model that shares the target's noise; owns its cache of the sequence.

    Args:
        model: As `CachedLM` takes it.
        error_scale: Size of the model's errors against the target, in logits / T; see `coupling.fit_error_scale`.
            Larger values spread the tree over more candidates.
        source: Bit that marks its nodes.
    """

    needs_hidden = False

    def __init__(self, model: nn.Module, *, error_scale: float = 1.0, source: int = 1) -> None:
        config = getattr(model, "config", model)
        self.vocab_size: int | None = getattr(config, "vocab_size", None)
        self._lm, self._error_scale, self._source = CachedLM(model), error_scale, source
        self._known: list[int] = []

    def propose(
        self,
        context: Sequence[int],
        hidden: torch.Tensor | None,
        *,
        sampling: KeyedSampling,
        max_width: int,
        max_depth: int,
        budget: int,
    ) -> ScoredTree:
        """See `Drafter.propose`. Candidates are ranked with the noise of their position, layer by layer."""
        logits = self._catch_up(context)
        growth = TreeGrowth(max_width=max_width, budget=budget, source=self._source)
        base, frontier, slots = len(context), [0], 0
        seen: dict[int, list[int]] = {0: []}  # slots behind the context that each row sees
        for depth in range(1, max_depth + 1):
            positions = [base - 1 + depth] * len(frontier)
            found, logprobs = sampling.candidates(logits, positions, width=max_width, error_scale=self._error_scale)
            parents = [row for row in frontier for _ in range(found.shape[1])]
            kept = growth.extend(found.flatten().tolist(), parents, logprobs.flatten().tolist())
            if not kept or depth == max_depth:
                break
            layer = growth.nodes(kept)
            mask: np.ndarray = np.zeros((len(kept), slots + len(kept)), dtype=bool)
            for place, (row, (_, parent)) in enumerate(zip(kept, layer, strict=True)):
                seen[row] = [*seen[parent], slots + place]
                mask[place, seen[row]] = True
            logits = self._lm.forward([token for token, _ in layer], np.full(len(kept), base - 1 + depth), mask).logits
            slots += len(kept)
            frontier = kept
        self._lm.keep(base)
        return growth.finish()

    def _catch_up(self, context: Sequence[int]) -> torch.Tensor:
        """Bring the cache to the whole context; the logits [1, V] after its last token."""
        # The last token is forwarded in any case: its logits are the first layer's.
        common, limit = 0, min(len(self._known), len(context) - 1)
        while common < limit and self._known[common] == context[common]:
            common += 1
        self._lm.keep(common)
        self._known = list(context)
        return self._lm.extend(context[common:]).logits[-1:]
