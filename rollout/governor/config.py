"""What the governor may spend and when it changes its mind. Limits of trees are in `rollout.speculation_config`."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.errors import InvalidRequest, check_positive


@dataclass(kw_only=True)
class GovernorConfig:
    """How speculation is governed; the defaults need no tuning to keep the promise of `guard_share`."""

    # Share of the time that speculation, trials included, may lose against none; what it gains is not counted beyond
    # `cap_steps`. Whatever the estimates say, it is off while the account is overdrawn.
    guard_share: float = 0.015
    explore_share: float = (
        0.0075  # share of the time that trials may lose against the best choice known; part of the above
    )
    explore_gains: float = (
        0.05  # share of the time that drafts save, which trials may lose against the best choice known as well
    )
    # Step times that each account holds at the start, so that trials need not wait for income.
    grant_steps: float = 3.0
    # Most step times that an account holds, so that a long good time does not pay for a bad one: what trials may take
    # at once when the weights change, at each size of a batch.
    cap_steps: float = 6.0
    switch_margin: float = 0.01  # gain over the present choice from which another is taken; smaller = flaps on noise
    decide_every: int = 16  # steps between decisions while nothing but the estimates changes
    retry_steps: int = 256  # steps until a source that did not pay is tried again; doubles each time it fails again
    max_retry_steps: int = 16_384  # the longest such wait
    memory_trials: int = 1024  # verified drafts that acceptance remembers of a source, and of a set of sources
    carried_trials: int = 64  # of those, what a new version of the weights inherits from the one before
    alarm_probability: float = 1e-4  # of a false alarm, for each source and weight sync
    tolerated_drop: float = (
        0.8  # acceptance after a sync, of that before it, that is never an alarm but with that chance
    )
    collapsed_drop: float = 0.3  # the same, from which on the alarm is as fast as it can be

    def __post_init__(self) -> None:
        check_positive(
            "governor",
            guard_share=self.guard_share,
            explore_share=self.explore_share,
            explore_gains=self.explore_gains,
            cap_steps=self.cap_steps,
            switch_margin=self.switch_margin,
            decide_every=self.decide_every,
            retry_steps=self.retry_steps,
            memory_trials=self.memory_trials,
            carried_trials=self.carried_trials,
            alarm_probability=self.alarm_probability,
            collapsed_drop=self.collapsed_drop,
        )
        if not 0 <= self.grant_steps <= self.cap_steps:
            raise InvalidRequest("governor.grant_steps", self.grant_steps, f"0 to cap_steps = {self.cap_steps}")
        if self.max_retry_steps < self.retry_steps:
            raise InvalidRequest("governor.max_retry_steps", self.max_retry_steps, f"≥ {self.retry_steps}")
        if not self.collapsed_drop < self.tolerated_drop <= 1:
            expected = f"above collapsed_drop = {self.collapsed_drop}, up to 1"
            raise InvalidRequest("governor.tolerated_drop", self.tolerated_drop, expected)
        if not self.explore_share < self.guard_share:
            raise InvalidRequest(
                "governor.explore_share", self.explore_share, f"below guard_share = {self.guard_share}"
            )
        for name in ("guard_share", "explore_share", "explore_gains", "alarm_probability"):
            if getattr(self, name) >= 1:
                raise InvalidRequest(f"governor.{name}", getattr(self, name), "below 1")
