"""What a controller tells about the weights that it serves."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.fleet import SyncReport


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsState:
    """The weights at one moment.

    Attributes:
        live_version: That is served.
        state: Of the publisher: idle, staging, flipping or broken.
        num_published, num_refused: Since the controller's start.
        recent: The newest publications that succeeded, oldest first.
    """

    live_version: int
    state: str
    num_published: int
    num_refused: int
    recent: tuple[SyncReport, ...]
