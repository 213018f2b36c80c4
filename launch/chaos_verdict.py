"""What a disturbed run has to show: nothing lost, nothing learned from twice, the same tokens. A part of launch.chaos.

Reads both journals and the checkpoints' cursors; starts nothing. Tokens are compared in the order of the steps: from
the step after a near tie on, the two runs train on different tokens and may differ for that reason alone, so what
differs there is counted apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from launch.near_ties import compare
from rollout.config import JournalConfig
from rollout.cursor import Cursor
from rollout.journal.opening import open_reader
from rollout.journal.reading import slices
from rollout.journal.records import RestoredGroup
from rollout.types import Status, Trajectory

USED = (Status.COMPLETED, Status.TRUNCATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """What it takes to tell a near tie; see launch.near_ties.compare."""

    temperature: float
    vocab_size: int
    within: float


@dataclass(slots=True, kw_only=True)
class Ledger:
    """What is durable of a finished run.

    Attributes:
        learned: (step of the checkpoint, group id) along the history of checkpoints, which is never rewritten: a run
            goes on from the newest one.
        groups: Every group in the journal, by id; of a group under several runs the last.
        num_keys: Groups in the journal, by id: more than one is a group that was submitted as two.
    """

    learned: list[tuple[int, str]] = field(default_factory=list)
    groups: dict[str, RestoredGroup] = field(default_factory=dict)
    num_keys: Counter[str] = field(default_factory=Counter)

    @property
    def used(self) -> list[str]:
        """Groups that the run has learned from, each once, in order."""
        return list(dict.fromkeys(group_id for _, group_id in self.learned))

    @property
    def num_tokens(self) -> int:
        """Durable tokens."""
        return sum(one.num_tokens for group in self.groups.values() for one in group.trajectories)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sameness:
    """Trajectories of the disturbed run against those of the undisturbed one.

    Attributes:
        num_compared: In groups that both have used.
        num_equal: With the same tokens and the same end.
        num_near_ties: That part at a near tie.
        num_after_near_tie: That differ in a step after one with a near tie.
        differences: Others, in words.
    """

    num_compared: int
    num_equal: int
    num_near_ties: int
    num_after_near_tie: int
    differences: tuple[str, ...]


def read_ledger(run_dir: Path, journal: JournalConfig) -> Ledger:
    """All of a run whose checkpoints were all kept."""
    ledger = Ledger()
    for path in sorted((run_dir / "checkpoints").glob("step-*/cursor.json")):
        cursor = Cursor.from_json(path.read_text())
        ledger.learned += [(cursor.step, group_id) for group_id in cursor.learned]
    with open_reader(journal) as reader:
        for run_id in reader.run_ids():
            for keys in slices(reader.run_keys(run_id)):
                for group in reader.load(keys):
                    ledger.groups[group.group_id] = group
                    ledger.num_keys[group.group_id] += 1
    return ledger


def num_lost(ledger: Ledger, num_groups: int, n_samples: int) -> int:
    """Trajectories that the run should have learned from, and that are missing, unfinished or without their tokens.

    Args:
        ledger: Of the run.
        num_groups: That all of its steps use.
        n_samples: Trajectories of each.
    """
    whole = 0
    for group_id in ledger.used:
        group = ledger.groups.get(group_id)
        members = group.trajectories if group is not None else ()
        whole += sum(one.outline.status in (*USED, Status.FAILED) for one in members)
    return num_groups * n_samples - whole


def num_duplicated(ledger: Ledger) -> int:
    """Groups learned from more than once, acknowledged to another checkpoint than learned them, or kept twice."""
    times = Counter(group_id for _, group_id in ledger.learned)
    twice = sum(count - 1 for count in times.values())
    two_keys = sum(count - 1 for count in ledger.num_keys.values())
    elsewhere = sum(
        ledger.groups[group_id].checkpoint != f"step {step}"
        for step, group_id in ledger.learned
        if group_id in ledger.groups
    )
    return twice + two_keys + elsewhere


def failures(ledger: Ledger) -> dict[str, int]:
    """Failed trajectories by reason, of all groups."""
    every = (one.outline for group in ledger.groups.values() for one in group.trajectories)
    return dict(Counter(str(one.error) for one in every if one.status is Status.FAILED))


def sameness(disturbed: Ledger, undisturbed: Ledger, ties: Ties, groups_per_step: int) -> Sameness:
    """Compare token by token.

    Args:
        disturbed, undisturbed: Of two runs of one configuration.
        ties: How near ties are told.
        groups_per_step: Used by each step.
    """
    num_compared = num_equal = num_near_ties = num_after = 0
    differences: list[str] = []
    is_after, met_tie = False, False
    known = set(undisturbed.used)
    for place, group_id in enumerate(disturbed.used):
        if place % groups_per_step == 0:
            is_after = met_tie
        if group_id not in known:
            continue
        pair = (disturbed.groups[group_id].to_group(), undisturbed.groups[group_id].to_group())
        for mine, theirs in zip(pair[0].trajectories, pair[1].trajectories, strict=True):
            num_compared += 1
            kind, words = _compare(mine, theirs, ties)
            num_equal += kind == "equal"
            num_after += kind != "equal" and is_after
            num_near_ties += kind == "near tie" and not is_after
            met_tie |= kind == "near tie"
            if kind == "different" and not is_after:
                differences.append(words)
    return Sameness(
        num_compared=num_compared,
        num_equal=num_equal,
        num_near_ties=num_near_ties,
        num_after_near_tie=num_after,
        differences=tuple(differences),
    )


def _compare(mine: Trajectory, theirs: Trajectory, ties: Ties) -> tuple[str, str]:
    difference = compare(
        (mine.token_ids, mine.logprobs),
        (theirs.token_ids, theirs.logprobs),
        seed=mine.seed,
        num_prompt_tokens=len(mine.prompt_token_ids),
        temperature=ties.temperature,
        vocab_size=ties.vocab_size,
        within=ties.within,
    )
    if difference is not None:
        return ("near tie" if difference.is_near_tie else "different"), f"{mine.trajectory_id}: {difference}"
    ends = [(one.status.value, one.reward, one.error) for one in (mine, theirs)]
    return ("equal", "") if ends[0] == ends[1] else ("different", f"{mine.trajectory_id}: {ends[0]}, not {ends[1]}")
