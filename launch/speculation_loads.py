"""What the speculation bench is asked to measure, and its loads. A part of launch.bench_speculation.

Owns the options and the choice of prompts, seeds and lengths; runs nothing. No two loads share a prompt but the visits
of one, so that no draft comes from the very tokens that it is to predict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launch import rollout_turns
from launch.rollout_load import Load, heavy_loads, uniform_load
from launch.workload import Workload
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.governor.comparison import TURN_STEPS
from rollout.simulate.lengths import LengthModel
from rollout.types import Group, Prompt, RolloutRequest, SamplingParams

PARTS = ("tail", "answers", "rollout", "worst", "corrupted")
CORRUPTED_LOADS = 4  # of part corrupted, which take turns: a draft model does not remember what it drafted for
SETTLING, NOTICING = 8, 16  # turns in which a governor takes to a draft, and in which it may notice what became of it
WARM_UP_TOKENS = 64
MIN_LONG_TOKENS = 8 * TURN_STEPS  # several pairs of turns
MIN_CORRUPTED_TOKENS = 4 * TURN_STEPS  # a pair of turns at least
GIVEN_TOKENS = 8  # of an answer, that stand in the prompt of a tail
FIRST_PROMPT = 1_000_000  # of the workload: far behind those that a draft was trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        parts: Of tail, answers, rollout, worst and corrupted.
        tails: Numbers of sequences that still run, on one expert-parallel group.
        tail_pool: Answers of which a tail consists of the longest.
        tail_rounds: Tails of each size in a repeat, of different answers.
        answers: Prompts of part answers, with n members each.
        groups, n: Groups of a heavy-tailed load and members of each.
        slots: Sequences that one shard decodes together in a heavy-tailed load, and among answers.
        chunk_tokens: At which trajectories are cut.
        max_tokens: Where generations of a heavy-tailed load, and answers, are cut off.
        visits: Of each prompt of a heavy-tailed load, of which the last is measured.
        batches: Sequences that decode together while drafts are useless, on one expert-parallel group.
        batch_tokens, batch_rounds: That each of them generates, in a turn, and turns between two publications: short
            turns, so that ways share what else the machine does meanwhile.
        long_tokens, long_rounds: That each generates while turns are of a few steps, and such loads between two
            publications: about as many governed steps as in the turns above.
        corrupted_batch: Sequences that decode together while the draft is corrupted.
        corrupted_rounds: Turns for which they do, once it was noticed.
        ngram_tokens, ngram_match: Draft tokens of plain vLLM's prompt look-up, and the most that it compares.
        repeats: Of everything, each with other prompts and seeds.
        starts: Of all engines, each with all repeats: one process differs from the next by 2 % for as long as it lives.
        stock: Whether plain vLLM takes part, with and without speculation of its own.
        first_seed: Of the first repeat.
        out: JSON file for the result.
        picture: PNG file for it.
    """

    parts: tuple[str, ...] = PARTS
    tails: tuple[int, ...] = (1, 2, 4)
    tail_pool: int = 256
    tail_rounds: int = 3
    answers: int = 8
    groups: int = 16
    n: int = 8
    slots: int = 4
    chunk_tokens: int = 128
    max_tokens: int = 2048
    visits: int = 2
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    batch_tokens: int = 128
    batch_rounds: int = 8
    long_tokens: int = 1024
    long_rounds: int = 2
    corrupted_batch: int = 4
    corrupted_rounds: int = 12
    ngram_tokens: int = 5
    ngram_match: int = 4
    repeats: int = 3
    starts: int = 1
    stock: bool = True
    first_seed: int = 1
    out: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        for name in ("tail_rounds", "answers", "groups", "n", "slots", "chunk_tokens", "max_tokens", "visits"):
            self._check(name, (getattr(self, name),))
        for name in ("batch_tokens", "batch_rounds", "long_tokens", "long_rounds"):
            self._check(name, (getattr(self, name),))
        for name in ("corrupted_batch", "corrupted_rounds"):
            self._check(name, (getattr(self, name),))
        for name in ("ngram_tokens", "ngram_match", "repeats", "starts"):
            self._check(name, (getattr(self, name),))
        for name in ("tails", "batches"):
            self._check(name, getattr(self, name))
        if "worst" in self.parts and self.long_tokens < MIN_LONG_TOKENS:
            raise InvalidRequest("long_tokens", self.long_tokens, f"≥ {MIN_LONG_TOKENS}: several pairs of turns")
        if "tail" in self.parts and self.tail_pool < sum(self.tails) * self.tail_rounds:
            raise InvalidRequest("tail_pool", self.tail_pool, "as many answers as all tails of a repeat need")
        if "corrupted" in self.parts and self.tail_pool < CORRUPTED_LOADS * self.corrupted_batch:
            expected = f"{CORRUPTED_LOADS * self.corrupted_batch}: as many answers as part corrupted needs"
            raise InvalidRequest("tail_pool", self.tail_pool, expected)
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            raise InvalidRequest("parts", list(self.parts), f"some of {', '.join(PARTS)}")

    @staticmethod
    def _check(name: str, values: tuple[int, ...]) -> None:
        if not values or min(values) < 1:
            raise InvalidRequest(name, values[0] if len(values) == 1 else list(values), "integers ≥ 1")

    @property
    def most_sequences(self) -> int:
        """That any part decodes together on one shard."""
        return max(self.slots, *self.tails, *self.batches, self.corrupted_batch)

    @property
    def most_tokens(self) -> int:
        """That any part generates for one sequence."""
        return max(self.max_tokens, self.batch_tokens, self.long_tokens)

    def rollouts(self) -> rollout_turns.Options:
        """The part of them that the rollout bench knows."""
        return rollout_turns.Options(
            groups=self.groups,
            n=self.n,
            slots=self.slots,
            ahead=0,  # the engines have room for more sequences than these, for the other parts
            chunk_tokens=self.chunk_tokens,
            max_tokens=self.max_tokens,
            visits=self.visits,
            repeats=self.repeats,
            first_seed=self.first_seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """All loads of a bench; lists by repeat, dictionaries by the number of sequences.

    Attributes:
        warm_up: Lets every engine compile what it needs.
        pools: Answers that end where they end, one of each prompt.
        answers: The same in groups.
        earlier, heavy: Visits of the prompts before the measured one, and that one.
        worst: As many sequences as decode together, `batch_rounds` loads a repeat.
        long: The same for turns of a few steps, `long_rounds` loads a repeat.
        corrupted: Answers as in `pools`, of which part corrupted uses the longest.
    """

    warm_up: Load
    pools: list[Load]
    answers: list[Load]
    earlier: list[list[Load]]
    heavy: list[Load]
    worst: dict[int, list[list[Load]]]
    long: dict[int, list[list[Load]]]
    corrupted: Load

    @property
    def lengths(self) -> dict[str, int]:
        """At which trajectories end that do not show it."""
        every = [*self.heavy, *(load for visits in self.earlier for load in visits)]
        return {name: length for load in every for name, length in load.lengths.items()}


def make_loads(config: RunConfig, options: Options, model: LengthModel) -> Loads:
    """Loads of every repeat, numbered through the workload's prompts."""
    workload = Workload(config.workload, config.model, config.trainer.seed)
    seeds = range(options.first_seed, options.first_seed + options.repeats)
    prompts = _Prompts(workload)

    def several(number: int, num_tokens: int) -> dict[int, list[list[Load]]]:
        return {
            count: [
                [uniform_load(prompts.take(count), 1, run_seed=seed, num_tokens=num_tokens) for _ in range(number)]
                for seed in seeds
            ]
            for count in options.batches
        }

    drawn = [
        heavy_loads(
            prompts.take(options.groups),
            options.n,
            run_seed=seed,
            model=model,
            max_tokens=options.max_tokens,
            visits=options.visits,
        )
        for seed in seeds
    ]
    return Loads(
        warm_up=uniform_load(prompts.take(options.most_sequences), 1, run_seed=0, num_tokens=WARM_UP_TOKENS),
        pools=[_answers(prompts.take(options.tail_pool), 1, options, seed) for seed in seeds],
        answers=[_answers(prompts.take(options.answers), options.n, options, seed) for seed in seeds],
        earlier=[visits[:-1] for visits in drawn],
        heavy=[visits[-1] for visits in drawn],
        worst=several(options.batch_rounds, options.batch_tokens),
        long=several(options.long_rounds, options.long_tokens),
        corrupted=_answers(prompts.take(options.tail_pool), 1, options, options.first_seed),
    )


def tail_loads(pool: Load, groups: Sequence[Group], options: Options) -> dict[int, list[Load]]:
    """What is left of a rollout when its longest answers alone still run: `tail_rounds` loads of each size.

    A trajectory is asked for again, with the first tokens of its answer as part of the prompt: keyed noise depends on
    places alone, so it goes on as it did, and plain vLLM, which draws otherwise, goes on with text of the same kind.

    Args:
        pool: Answers, one of each prompt.
        groups: As they were served, in order.
        options: See `Options`.

    Raises:
        LongrollError: The model's answers are too short.
    """
    answers, longest = _by_length(pool, groups)
    loads: dict[int, list[Load]] = {count: [] for count in options.tails}
    for _ in range(options.tail_rounds):
        for count in options.tails:
            chosen, longest = longest[:count], longest[count:]
            loads[count].append(_continued(pool.request, chosen, answers))
    return loads


def corrupted_loads(pool: Load, groups: Sequence[Group], options: Options) -> list[Load]:
    """The longest answers of a pool, dealt to CORRUPTED_LOADS loads of about the same length.

    Arguments as of `tail_loads`.

    Raises:
        LongrollError: The model's answers are too short, if only to be compared by turns of a few steps.
    """
    answers, longest = _by_length(pool, groups)
    chosen = longest[: CORRUPTED_LOADS * options.corrupted_batch]
    shortest = len(answers[pool.request.group_ids[chosen[-1]]]) - GIVEN_TOKENS
    if shortest < MIN_CORRUPTED_TOKENS:
        raise LongrollError(
            f"corrupted: got an answer of {shortest} tokens among the {len(chosen)} longest of {len(groups)}, expected"
            f" {MIN_CORRUPTED_TOKENS} or more, several turns of {TURN_STEPS} steps; a larger tail_pool has longer ones"
        )
    return [_continued(pool.request, chosen[place::CORRUPTED_LOADS], answers) for place in range(CORRUPTED_LOADS)]


def _by_length(pool: Load, groups: Sequence[Group]) -> tuple[dict[str, list[int]], list[int]]:
    """Answers by group, and places in the pool, the longest answer's first."""
    answers = {group.group_id: group.trajectories[0].token_ids for group in groups}
    return answers, sorted(range(len(groups)), key=lambda place: -len(answers[pool.request.group_ids[place]]))


def _continued(request: RolloutRequest, places: Sequence[int], answers: Mapping[str, Sequence[int]]) -> Load:
    """The trajectories of the prompts at these places, beyond their first tokens."""
    ids = tuple(request.group_ids[place] for place in places)
    if min(len(answers[name]) for name in ids) <= 2 * GIVEN_TOKENS:
        raise LongrollError(f"tail: got an answer of {2 * GIVEN_TOKENS} tokens or less among the longest")
    prompts = tuple(
        replace(
            request.prompts[place], token_ids=request.prompts[place].token_ids + tuple(answers[name][:GIVEN_TOKENS])
        )
        for place, name in zip(places, ids, strict=True)
    )
    lengths = {f"{name}/0": len(answers[name]) - GIVEN_TOKENS for name in ids}
    return Load(request=replace(request, prompts=prompts, group_ids=ids), lengths=lengths)


class _Prompts:
    """Owns the number of the next prompt that no load has had."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self._next = workload, FIRST_PROMPT

    def take(self, count: int) -> list[Prompt]:
        self._next += count
        return self._workload.batch(self._next - count, count)


def _answers(prompts: Sequence[Prompt], n: int, options: Options, run_seed: int) -> Load:
    request = RolloutRequest(
        prompts=tuple(prompts),
        n_samples_per_prompt=n,
        sampling=SamplingParams(max_tokens=options.max_tokens),
        run_seed=run_seed,
        group_ids=tuple(f"{prompt.prompt_id}@answers" for prompt in prompts),
    )
    return Load(request=request, lengths={})
