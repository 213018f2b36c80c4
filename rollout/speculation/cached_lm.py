"""A causal language model with the KV cache of one sequence: extend it, try a tree, keep what was accepted.

Owns the cache and the 4D masks. Knows nothing of sampling or of drafts. It is written for exactness and for being
read, not for speed: every pass copies the cache once, as `transformers.DynamicCache` does.

The model is called the way Hugging Face causal models are: input_ids, attention_mask, position_ids,
past_key_values, use_cache; it returns an object with logits, and stores keys and values [1, heads, S, width] by
`past_key_values.update(keys, values, layer)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from rollout.errors import InvalidRequest

PREFILL_TOKENS = 512
"""Tokens of a long extension forwarded at once: bounds the mask, which is dense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a forward yields: logits [n, V], and hidden states after the final norm [n, H] where they were wanted."""

    logits: torch.Tensor
    hidden: torch.Tensor | None


class CachedLM:
    """Owns the cache of one sequence.

    Args:
        model: The language model, in evaluation mode.
        wants_hidden: Ask for hidden states too (`output_hidden_states=True`).

    Raises:
        InvalidRequest: The model is in training mode, so its dropout would be at work.
    """

    def __init__(self, model: nn.Module, *, wants_hidden: bool = False) -> None:
        if model.training:
            raise InvalidRequest(type(model).__name__, "a model in training mode", "one in evaluation mode: eval()")
        self._model, self._wants_hidden = model, wants_hidden
        parameter = next(model.parameters(), None)
        self._dtype = torch.float32 if parameter is None else parameter.dtype
        self._device = torch.device("cpu") if parameter is None else parameter.device
        self._cache = DynamicCache()
        self._length = 0

    def __len__(self) -> int:
        """Tokens in the cache."""
        return self._length

    def extend(self, tokens: Sequence[int]) -> Pass:
        """Forward tokens that follow one another; all their rows are returned."""
        passes = []
        for start in range(0, len(tokens), PREFILL_TOKENS):
            part = tokens[start : start + PREFILL_TOKENS]
            order = np.arange(len(part))
            passes.append(self.forward(part, self._length + order, order[:, None] >= order))
        hidden = None if passes[0].hidden is None else torch.cat([one.hidden for one in passes])
        return Pass(logits=torch.cat([one.logits for one in passes]), hidden=hidden)

    @torch.no_grad()
    def forward(self, tokens: Sequence[int] | np.ndarray, positions: np.ndarray, mask: np.ndarray) -> Pass:
        """Forward n rows and append them to the cache.

        Args:
            tokens: [n] ids.
            positions: [n] absolute positions; rows of a tree stand at their depth, not at their slot.
            mask: [n, m] bool, m >= n: which of the last m slots each row sees, its own pass's being the last n. It
                sees all slots before those.
        """
        num_rows, num_masked = mask.shape
        width = self._length + num_rows
        bias = torch.zeros(num_rows, width, dtype=self._dtype)
        bias[:, width - num_masked :].masked_fill_(~torch.from_numpy(mask), torch.finfo(self._dtype).min)
        output = self._model(
            input_ids=torch.as_tensor(tokens, dtype=torch.int64, device=self._device)[None],
            attention_mask=bias[None, None].to(self._device),
            position_ids=torch.as_tensor(positions, dtype=torch.int64, device=self._device)[None],
            past_key_values=self._cache,
            use_cache=True,
            **({"output_hidden_states": True} if self._wants_hidden else {}),
        )
        self._length = width
        return Pass(logits=output.logits[0], hidden=output.hidden_states[-1][0] if self._wants_hidden else None)

    def keep(self, base: int, rows: Sequence[int] = ()) -> None:
        """Drop all slots from `base` on, except those at base + rows, which become consecutive.

        Args:
            base: Slots that stay as they are.
            rows: Ascending; row r lies at slot base + r.
        """
        length = base + len(rows)
        slots = torch.tensor([base + row for row in rows], dtype=torch.int64, device=self._device)
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                stored = getattr(layer, name)
                if len(rows):
                    stored[..., base:length, :] = stored.index_select(-2, slots)
                setattr(layer, name, stored[..., :length, :])
        self._length = length
