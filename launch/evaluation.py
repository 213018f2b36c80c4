"""Scores on held-out problems, and whether two sets of them differ by more than luck.

Owns the records and the paired test; knows nothing of how answers are generated.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy.stats import binomtest

from rollout.types import Group, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One answer to each held-out problem, in order of group id.

    Attributes:
        rewards: Of each problem; None where its trajectory failed.
        exact: Whether the answer is exactly right; None where it failed.
        lengths: Generated tokens.
        version: Weight version that answered.
        duration_s: Seconds it took.
    """

    rewards: tuple[float | None, ...]
    exact: tuple[bool | None, ...]
    lengths: tuple[int, ...]
    version: int
    duration_s: float

    @property
    def reward(self) -> float:
        """Mean reward of the problems that were scored."""
        scored = [r for r in self.rewards if r is not None]
        return sum(scored) / max(len(scored), 1)

    @property
    def exact_rate(self) -> float:
        scored = [e for e in self.exact if e is not None]
        return sum(scored) / max(len(scored), 1)

    @property
    def length_mean(self) -> float:
        return sum(self.lengths) / max(len(self.lengths), 1)

    @property
    def num_failed(self) -> int:
        return sum(r is None for r in self.rewards)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> Evaluation:
        values = json.loads(path.read_text())
        for name in ("rewards", "exact", "lengths"):
            values[name] = tuple(values[name])
        return Evaluation(**values)


def evaluation_of(groups: list[Group], version: int, duration_s: float) -> Evaluation:
    """Collect groups of one sample each."""
    samples = [group.trajectories[0] for group in sorted(groups, key=lambda g: g.group_id)]
    return Evaluation(
        rewards=tuple(None if t.status is Status.FAILED else t.reward for t in samples),
        exact=tuple(is_exact(t.metadata, t.reward) for t in samples),
        lengths=tuple(len(t.token_ids) for t in samples),
        version=version,
        duration_s=duration_s,
    )


def is_exact(metadata: dict[str, object], reward: float | None) -> bool | None:
    """Whether a trajectory's answer is exactly right: the verifier's word, else a full reward."""
    if reward is None:
        return None
    extras = metadata.get("score")
    exact = extras.get("exact") if isinstance(extras, dict) else None
    return bool(exact) if exact is not None else reward >= 1.0


def paired_p_value(before: Evaluation, after: Evaluation) -> float:
    """Exact McNemar (sign) test on the same problems: two-sided, only problems that changed count.

    Args:
        before, after: Of the same problems in the same order; a problem that failed in either is left out.

    Returns:
        Probability of at least this imbalance between better and worse if neither were likelier.
    """
    if len(before.rewards) != len(after.rewards):
        raise ValueError(f"paired test: got {len(before.rewards)} and {len(after.rewards)} problems, expected as many")
    pairs = [(b, a) for b, a in zip(before.rewards, after.rewards, strict=True) if b is not None and a is not None]
    better = sum(a > b for b, a in pairs)
    worse = sum(a < b for b, a in pairs)
    if better + worse == 0:
        return 1.0
    return float(binomtest(better, better + worse, 0.5).pvalue)
