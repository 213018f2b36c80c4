"""An account of seconds: what may be lost is earned as time passes, and what is lost is taken from it.

Over any span, losses ≤ share · seconds + the cap + what the last step overdrew. That holds whatever the estimates
that led to the losses were worth, and is what makes the bound on the worst case. Each size of a batch has an account of
its own, so the bound holds for the steps of each size, and over all of them with a cap for each size that occurred.
"""

from __future__ import annotations

import math


class LossAccount:
    """Owns one balance, in seconds.

    Args:
        share: Of the time that passes, what may be lost.
        grant_steps: Held at the start, in step times.
        cap_steps: Held at most, in step times.
    """

    def __init__(self, share: float, grant_steps: float, cap_steps: float) -> None:
        self._share, self._cap_steps, self._grant_steps = share, cap_steps, grant_steps
        self.balance_s = 0.0
        self.is_overdrawn = False
        self._is_granted = False

    def pass_time(self, elapsed_s: float, base_s: float) -> None:
        """A step ran.

        Args:
            elapsed_s: Its time.
            base_s: The time of such a step without speculation, in which grant and cap are measured.
        """
        if not self._is_granted:
            self.balance_s += self._grant_steps * base_s
            self._is_granted = True
        self.balance_s = min(self.balance_s + self._share * elapsed_s, self._cap_steps * base_s)
        # Reopened with some of a step in hand, so that it does not open and close by turns.
        if self.is_overdrawn and self.balance_s >= min(1.0, self._cap_steps) / 2 * base_s:
            self.is_overdrawn = False

    def charge(self, loss_s: float, base_s: float) -> None:
        """Seconds lost; below 0, gained."""
        self.balance_s = min(self.balance_s - loss_s, self._cap_steps * base_s)
        self.is_overdrawn = self.is_overdrawn or self.balance_s < 0

    def can_afford(self, loss_s: float) -> bool:
        return not self.is_overdrawn and loss_s <= self.balance_s


class Accounts:
    """An account for each size of a batch, all with the same terms. Arguments as of `LossAccount`."""

    def __init__(self, share: float, grant_steps: float, cap_steps: float) -> None:
        self._terms = (share, grant_steps, cap_steps)
        self._by_size: dict[int, LossAccount] = {}

    def of(self, num_sequences: int) -> LossAccount:
        """The account of batches of about so many sequences, at least 1."""
        size = size_class(num_sequences)
        if size not in self._by_size:
            self._by_size[size] = LossAccount(*self._terms)
        return self._by_size[size]


def size_class(num_sequences: int) -> int:
    """Batches of one class differ by less than a factor of 1.42."""
    return round(2 * math.log2(num_sequences))
