"""Compares what engines sample with drafts, whoever makes them, with what they sample without.

    python -m launch.check_speculation [tokens=200000] [prompts=8] [members=16] [drafters=sibling,clover2,…]
        [temperatures=0,0.7,1] [top_p=1,0.9] [out=PATH] [overrides …]

One service of two expert-parallel shards (any other with overrides) is started once. For every temperature and top-p
the same rollouts are asked for again and again, each time with another drafter verified in every step, and at last
without drafts; every token must be the same. Where the scores of two tokens lie closer together than the engine's
rounding either may win: such near ties are counted and shown, and what follows one is not compared. Rounds with new
prompts are run until enough tokens were compared.

It also tells how many drafted tokens a step brings, by drafter, and for siblings by the order in which the members of
a group finish: the first has nobody to learn from, the last has everybody. That is why they come first among the
drafters: later on the index knows the very trajectories from the runs before. Exit code 0 if all tokens are the same
but near ties, 1 if not, or if a drafter was never verified.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from actors.service import Service, start_service
from launch.arguments import split_arguments
from launch.cluster import model_path, start_ray
from launch.compose import compose, model_directory
from launch.near_ties import Difference, compare, near_tie
from launch.workload import Workload
from rollout.client import RolloutClient
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.speculation_config import DraftPolicy
from rollout.types import Group, Prompt, SamplingParams, Status, Trajectory

GREEDY_MEMBERS = 2  # of a group at temperature 0, where all are the same
GREEDY_TOKENS = 64  # of a trajectory then, past its end token: greedy answers may be a few tokens long
SIBLING, CLOVER = "sibling", "clover2"
DRAFT_MODEL = "draft"  # beside the model
SHOWN = 20  # differences
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is compared.

    Attributes:
        tokens: At least so many.
        prompts: Groups of a round, for each temperature and top-p.
        members: Samples of each.
        drafters: In this order; "+" between sources that draft together.
        temperatures, top_p: Each with each, but for temperature 0, to which top-p is nothing.
        out: JSON file for the report.
    """

    tokens: int = 200_000
    prompts: int = 8
    members: int = 16
    drafters: tuple[str, ...] = (SIBLING, CLOVER, "random", "adversarial", f"{CLOVER}+{SIBLING}")
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    top_p: tuple[float, ...] = (1.0, 0.9)
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "prompts", "members"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "an integer ≥ 1")
        for name in ("drafters", "temperatures", "top_p"):
            if not getattr(self, name):
                raise InvalidRequest(name, "none", "at least one")

    @property
    def sources(self) -> tuple[str, ...]:
        """All that the engines must be started with."""
        return tuple(sorted({source for drafter in self.drafters for source in drafter.split("+")}))

    def samplings(self, max_tokens: int) -> list[SamplingParams]:
        """How tokens are drawn. Raises InvalidRequest for a temperature or top-p that cannot be."""
        greedy = SamplingParams(max_tokens=min(max_tokens, GREEDY_TOKENS), temperature=0.0, ignore_eos=True)
        sampled = [
            SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
            for temperature in self.temperatures
            if temperature
            for top_p in self.top_p
        ]
        return [greedy, *sampled] if 0.0 in self.temperatures else sampled


@dataclass(slots=True, kw_only=True)
class Tally:
    """What drafts came to, over some trajectories. `tokens` were generated, `accepted` of them drafted."""

    tokens: int = 0
    trees: int = 0
    nodes: int = 0
    accepted: int = 0

    @property
    def accepted_a_step(self) -> float:
        """Drafted tokens that a step of one sequence brings, beside its own."""
        return self.accepted / max(1, self.tokens - self.accepted)

    def add(self, one: Trajectory) -> None:
        self.tokens += len(one.token_ids)
        self.trees += one.metadata["num_draft_trees"]
        self.nodes += one.metadata["num_draft_nodes"]
        self.accepted += one.metadata["num_draft_accepted"]


@dataclass(slots=True, kw_only=True)
class DrafterReport:
    """One drafter against none.

    Attributes:
        num_tokens: Compared: up to the first difference of each trajectory.
        num_trajectories: Compared.
        differences: One a trajectory that differs, with its id and how it was sampled.
        drafts: What came of them.
    """

    num_tokens: int = 0
    num_trajectories: int = 0
    differences: list[tuple[str, Difference]] = field(default_factory=list)
    drafts: Tally = field(default_factory=Tally)

    @property
    def num_near_ties(self) -> int:
        return sum(difference.is_near_tie for _, difference in self.differences)


class Campaign:
    """Compares rollouts of a service with each drafter and without; owns the reports.

    Args:
        service: It speculates with all of the options' sources. Nobody else may use it meanwhile.
        workload: Its training problems are the prompts.
        options: What is compared.
        dtype: In which the engines compute.
        max_tokens: Of one trajectory.
        say: Told what was done.
    """

    def __init__(
        self, service: Service, workload: Workload, options: Options, *, dtype: str, max_tokens: int, say: Say
    ) -> None:
        self._began = time.monotonic()
        self._service, self._workload, self._options = service, workload, options
        self._dtype, self._say = dtype, say
        self._samplings = options.samplings(max_tokens)
        self._client: RolloutClient = service.client
        self._num_prompts = 0
        self.reports = {drafter: DrafterReport() for drafter in options.drafters}
        self.by_member = [Tally() for _ in range(options.members)]

    @property
    def num_tokens(self) -> int:
        """Compared so far."""
        return sum(report.num_tokens for report in self.reports.values())

    def run(self) -> None:
        """Rounds until enough was compared; the report is written as it grows.

        Raises:
            LongrollError: A trajectory failed.
        """
        out = self._options.out
        while self.num_tokens < self._options.tokens:
            for sampling in self._samplings:
                self._compare(sampling)
                if out is not None:
                    Path(out).write_text(json.dumps(self.record(), indent=1) + "\n")

    def _compare(self, sampling: SamplingParams) -> None:
        options = self._options
        members = options.members if sampling.temperature else min(GREEDY_MEMBERS, options.members)
        num_prompts = options.prompts * options.members // members
        prompts = self._workload.batch(self._num_prompts, num_prompts)
        self._num_prompts += num_prompts
        drafted = {drafter: self._rollout(prompts, members, sampling, drafter) for drafter in options.drafters}
        plain = self._rollout(prompts, members, sampling, None)
        for drafter, groups in drafted.items():
            self._take(drafter, groups, plain, sampling)
        if sampling.temperature and SIBLING in drafted:
            for group in drafted[SIBLING]:
                in_order = sorted(group.trajectories, key=lambda one: one.metadata["total_s"])
                for tally, one in zip(self.by_member, in_order, strict=True):
                    tally.add(one)

    def _rollout(
        self, prompts: Sequence[Prompt], members: int, sampling: SamplingParams, drafter: str | None
    ) -> list[Group]:
        sources = [] if drafter is None else drafter.split("+")
        ray.get([shard.turn_speculation.remote(sources, DraftPolicy.ALWAYS) for shard in self._service.shards])
        began = time.monotonic()
        group_ids = [prompt.prompt_id for prompt in prompts]
        groups = self._client.rollout(prompts, members, sampling, group_ids=group_ids)
        everyone = [one for group in groups for one in group.trajectories]
        for one in everyone:
            if one.status not in (Status.COMPLETED, Status.TRUNCATED):
                raise LongrollError(f"trajectory {one.trajectory_id} is {one.status.value}: {one.error}")
        drafts = Tally()
        for one in everyone:
            drafts.add(one)
        self._say(
            f"T = {sampling.temperature:g}, top-p {sampling.top_p:g}, {drafter or 'no drafts'}: {drafts.tokens} tokens "
            f"in {time.monotonic() - began:.1f} s, {drafts.accepted_a_step:.2f} accepted a step"
        )
        return groups

    def _take(self, drafter: str, drafted: list[Group], plain: list[Group], sampling: SamplingParams) -> None:
        report = self.reports[drafter]
        within = near_tie(self._dtype, sampling.temperature)
        for ours, theirs in zip(drafted, plain, strict=True):
            for one, other in zip(ours.trajectories, theirs.trajectories, strict=True):
                difference = compare(
                    (one.token_ids, one.logprobs),
                    (other.token_ids, other.logprobs),
                    seed=one.seed,
                    num_prompt_tokens=len(one.prompt_token_ids),
                    temperature=sampling.temperature,
                    vocab_size=self._service.infos[0].vocab_size,
                    within=within,
                )
                report.num_trajectories += 1
                report.num_tokens += len(other.token_ids) if difference is None else difference.index
                report.drafts.add(one)
                if difference is not None:
                    where = f"{drafter}, T = {sampling.temperature:g}, top-p {sampling.top_p:g}, {one.trajectory_id}"
                    report.differences.append((where, difference))
                    self._say(f"{where}: {difference}")

    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        differences = [(where, found) for report in self.reports.values() for where, found in report.differences]
        return {
            "num_tokens": self.num_tokens,
            "num_different": len(differences),
            "num_near_ties": sum(found.is_near_tie for _, found in differences),
            "seconds": time.monotonic() - self._began,
            "drafters": {
                name: {
                    "num_tokens": report.num_tokens,
                    "num_trajectories": report.num_trajectories,
                    "num_different": len(report.differences),
                    "num_near_ties": report.num_near_ties,
                    "accepted_a_step": report.drafts.accepted_a_step,
                    "accepted_of_drafted": report.drafts.accepted / max(1, report.drafts.nodes),
                    "trees": report.drafts.trees,
                }
                for name, report in self.reports.items()
            },
            "by_member": [tally.accepted_a_step for tally in self.by_member],
            "differences": [{"where": where, **asdict(found)} for where, found in differences[:SHOWN]],
        }


def verdict(reports: dict[str, DrafterReport]) -> str | None:
    """What is wrong; None if all is well."""
    for drafter, report in reports.items():
        bad = len(report.differences) - report.num_near_ties
        if bad:
            return f"{drafter}: {bad} trajectories differ without a near tie"
        if not report.drafts.trees:
            return f"{drafter}: it had no tree to verify"
    return None


def check(config: RunConfig, options: Options) -> int:
    """Start the engines and compare. Returns the exit code."""
    model_directory(config.model.path)
    config.model.path = model_path(config.model.path)
    speculation = config.engine.speculation
    draft_model = speculation.draft_model or str(Path(config.model.path) / DRAFT_MODEL)
    config.engine.speculation = replace(
        speculation,
        enabled=True,
        sources=options.sources,
        draft_model=draft_model if CLOVER in options.sources else None,
    )
    workload = Workload(config.workload, config.model, config.trainer.seed)
    start_ray(config)
    try:
        parts = config.model, config.engine, config.scheduler, config.sync, config.cluster
        _say(f"starting {config.engine.num_all_shards} shards that draft with {', '.join(options.sources)}")
        with start_service(*parts) as service:
            campaign = Campaign(
                service,
                workload,
                options,
                dtype=config.engine.dtype or config.model.dtype,
                max_tokens=config.sampling.max_tokens,
                say=_say,
            )
            campaign.run()
    finally:
        ray.shutdown()
    result, wrong = campaign.record(), verdict(campaign.reports)
    print(json.dumps(result, indent=1))
    _say(wrong or f"{result['num_tokens']} tokens are the same, but for {result['num_near_ties']} near ties")
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        return check(compose(overrides), options)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
