"""How long a decode step takes by batch and context, learned from chunks that came back.

    seconds a token = fixed + per_sequence · batch + per_token · context tokens of the batch

fitted by recursive least squares with forgetting (Ljung, System Identification, 1999, §11.2), so that it
follows what changes: other weights, speculation, a busy machine. Only used to price migrations.
"""

from __future__ import annotations

import numpy as np

FORGETTING = 0.995  # of a chunk; the last 200 chunks or so count
MAX_UNCERTAINTY = 1e4
MIN_CHUNKS = 16  # before anything is priced
MIN_TOKENS = 16  # of a chunk that tells anything about decoding
PREFILL_SPEEDUP = 20.0  # prefilled tokens in the time of one decoded one, until measured; cautious: 50-500 on GPUs
SCALE = (1.0, 64.0, 65_536.0)  # of the three terms, so that the fit is well conditioned


class StepCosts:
    """Learns from every chunk; prices moves once it has seen enough of them."""

    def __init__(self) -> None:
        self._weights = np.zeros(3)
        self._covariance = np.eye(3) * 1e3
        self._num_chunks = 0

    @property
    def is_known(self) -> bool:
        return self._num_chunks >= MIN_CHUNKS

    def learn(self, num_tokens: int, duration_s: float, batch: int, context_tokens: int) -> None:
        """A chunk came back.

        Args:
            num_tokens: It generated.
            duration_s: From the shard's submission to its engine to the last token.
            batch: Sequences in the largest batch of its group, on the way.
            context_tokens: KV reserved on its shard.
        """
        if num_tokens < MIN_TOKENS or duration_s <= 0:
            return
        x = np.array([1.0, batch / SCALE[1], context_tokens / SCALE[2]])
        gain = self._covariance @ x / (FORGETTING + x @ self._covariance @ x)
        self._weights += gain * (duration_s / num_tokens - x @ self._weights)
        self._covariance -= np.outer(gain, x @ self._covariance)
        if np.trace(self._covariance) < MAX_UNCERTAINTY:  # chunks that are all alike tell nothing new
            self._covariance /= FORGETTING
        self._num_chunks += 1

    def token_s(self, batch: int, context_tokens: int) -> float:
        """Seconds a token; never below 0, and never falling with batch or context."""
        fixed, per_sequence, per_token = (max(0.0, float(w)) for w in self._weights)
        return fixed + per_sequence * batch / SCALE[1] + per_token * context_tokens / SCALE[2]

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds to compute the KV of so many tokens again."""
        return num_tokens * self.token_s(1, 0) / PREFILL_SPEEDUP
