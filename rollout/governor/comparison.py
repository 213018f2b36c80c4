"""Turns of a few steps in which an engine drafts as governed, and in which it does not, to compare the two.

The pace of a machine changes within a tenth of a second, and two processes of the very same engine differ for as long
as they live: only turns this short, of one engine, tell what a percent is. Turns follow from the number of the step
alone, so that all ranks of an expert-parallel group change together and whoever reads the records of steps knows them.
"""

from __future__ import annotations

TURN_STEPS = 8


def turn_of(step: int) -> int:
    """Number of the turn of a step; turns 2n and 2n + 1 are a pair, of which one is on hold."""
    return step // TURN_STEPS


def is_on_hold(step: int) -> bool:
    """Whether nobody drafts behind a step.

    Which turn of a pair comes first follows the Thue-Morse sequence, in which neither a drift nor a drift of the drift
    favours one of the two.
    """
    pair, place = divmod(turn_of(step), 2)
    return place != pair.bit_count() % 2
