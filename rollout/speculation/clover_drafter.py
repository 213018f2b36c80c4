"""The Clover-2 draft as a drafter of one sequence, for `rollout.speculation.decode`.

Owns the state of its sequence. Knows nothing of engines, which draft for batches with `CloverProposer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.errors import InvalidRequest
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_state import DraftState
from rollout.speculation.clover_trees import CloverProposer, DraftSampling
from rollout.speculation.coupling import KeyedSampling
from rollout.speculation.growth import ScoredTree


class CloverDrafter:
    """Drafts for one sequence from its first call on; see `rollout.speculation.draft.Drafter`.

    Args:
        draft: The model.
        target: The layers it shares.
        source: Bit that marks its nodes.
    """

    needs_hidden = True

    def __init__(self, draft: CloverDraft, target: TargetLayers, *, source: int = 1) -> None:
        self.vocab_size: int | None = draft.config.vocab_size
        self._proposer = CloverProposer(draft, target, source)
        self._state = DraftState.at(0)

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
        """See `Drafter.propose`.

        Raises:
            InvalidRequest: The hidden states are not those of the tokens accepted since the last call, or of another
                size than the draft's.
        """
        size, dtype = self._proposer.draft.config.hidden_size, self._proposer.draft.root_project.weight.dtype
        num_new = len(context) - 1 - self._state.position
        if hidden is None or hidden.shape != (num_new, size):
            got = None if hidden is None else tuple(hidden.shape)
            raise InvalidRequest("the target's hidden states", got, f"({num_new}, {size}), a row for each new token")
        tokens = torch.tensor(context[len(context) - num_new :], device=hidden.device)
        self._proposer.extend([self._state], [num_new], tokens, hidden.to(dtype))
        trees = self._proposer.propose(
            [self._state],
            DraftSampling(
                seeds=torch.tensor([sampling.seed], device=hidden.device),
                temperature=torch.tensor([sampling.temperature], dtype=torch.float32, device=hidden.device),
                top_k=None if sampling.top_k is None else torch.tensor([sampling.top_k], device=hidden.device),
                top_p=None if sampling.top_p == 1 else torch.tensor([sampling.top_p], device=hidden.device),
            ),
            [budget],
            max_width=max_width,
            max_depth=max_depth,
        )
        return trees[0]
