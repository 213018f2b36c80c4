"""Generating recorded tokens again, piece by piece, and comparing. A part of launch.replay.

A token depends on weights, seed and the tokens before it alone, so a piece is generated from the recorded tokens before
it; after a difference it goes on from the recorded token, so that one near tie does not hide what follows. Owns the
comparison; knows nothing of where engines or weights come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.near_ties import Difference, compare
from rollout.types import Chunk, ChunkResult, SamplingParams, Trajectory

MAX_DIFFERENCES = 16  # of a piece; after them it is given up
Generate = Callable[[Chunk], ChunkResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What is generated again.

    Attributes:
        trajectory: With its tokens.
        sampling: As it was submitted with.
        vocab_size: Token ids are below it.
        within: Largest distance of a near tie.
    """

    trajectory: Trajectory
    sampling: SamplingParams
    vocab_size: int
    within: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceResult:
    """A piece that was generated again.

    Attributes:
        num_compared: Its tokens, without those behind too many differences.
        differences: In order.
        max_logprob_gap: Largest difference of log-probabilities of a token that is the same, in nats.
    """

    num_compared: int
    differences: tuple[Difference, ...]
    max_logprob_gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A trajectory that was generated again.

    Attributes:
        num_tokens: Recorded.
        num_compared: With tokens of now.
        differences: In order.
        max_logprob_gap: See PieceResult.
        missing_versions: Whose weights cannot be had.
    """

    num_tokens: int
    num_compared: int
    differences: tuple[Difference, ...]
    max_logprob_gap: float
    missing_versions: tuple[int, ...] = ()

    @property
    def num_same(self) -> int:
        return self.num_compared - len(self.differences)

    @property
    def num_near_ties(self) -> int:
        return sum(one.is_near_tie for one in self.differences)

    @property
    def is_same(self) -> bool:
        """All that could be compared is the same, near ties aside."""
        return self.num_compared > 0 and all(one.is_near_tie for one in self.differences)

    @property
    def text(self) -> str:
        if self.num_compared == 0:
            return "verdict: nothing could be compared"
        if not self.is_same:
            first = next(one for one in self.differences if not one.is_near_tie)
            return f"verdict: differs, first at token {first.index}"
        part = "" if self.num_compared == self.num_tokens else f", in the {self.num_compared} tokens that can be had"
        return f"verdict: the same{' but for near ties' if self.differences else ''}{part}"


def pieces(start: int, stop: int, piece_tokens: int) -> list[tuple[int, int]]:
    """[start, stop) in pieces of at most so many tokens."""
    return [(first, min(first + piece_tokens, stop)) for first in range(start, stop, piece_tokens)]


def replay_piece(generate: Generate, recorded: Recorded, start: int, stop: int) -> PieceResult:
    """Generate the output tokens [start, stop) again, from the recorded ones before them."""
    trajectory = recorded.trajectory
    differences: list[Difference] = []
    max_gap, at = 0.0, start
    while at < stop and len(differences) < MAX_DIFFERENCES:
        result = generate(_chunk(recorded, at, stop))
        wanted = trajectory.token_ids[at:stop], trajectory.logprobs[at:stop]
        difference = compare(
            wanted,
            (result.token_ids, result.logprobs),
            seed=trajectory.seed,
            num_prompt_tokens=len(trajectory.prompt_token_ids),
            temperature=recorded.sampling.temperature,
            vocab_size=recorded.vocab_size,
            within=recorded.within,
            start=at,
        )
        same = (stop if difference is None else difference.index) - at
        gaps = (abs(a - b) for a, b in zip(wanted[1][:same], result.logprobs[:same], strict=True))
        max_gap = max(max_gap, *gaps, 0.0)
        at += same
        if difference is not None:
            differences.append(difference)
            at += 1
    return PieceResult(num_compared=at - start, differences=tuple(differences), max_logprob_gap=max_gap)


def verdict_of(num_tokens: int, results: Sequence[PieceResult], missing_versions: Sequence[int]) -> Verdict:
    """All pieces together; they are in order."""
    return Verdict(
        num_tokens=num_tokens,
        num_compared=sum(one.num_compared for one in results),
        differences=tuple(difference for one in results for difference in one.differences),
        max_logprob_gap=max((one.max_logprob_gap for one in results), default=0.0),
        missing_versions=tuple(missing_versions),
    )


def _chunk(recorded: Recorded, start: int, stop: int) -> Chunk:
    trajectory = recorded.trajectory
    return Chunk(
        trajectory_id=f"replay:{trajectory.trajectory_id}:{start}",
        token_ids=trajectory.prompt_token_ids + tuple(trajectory.token_ids[:start]),
        num_prompt_tokens=len(trajectory.prompt_token_ids),
        max_tokens=stop - start,
        seed=trajectory.seed,
        sampling=recorded.sampling,
    )
