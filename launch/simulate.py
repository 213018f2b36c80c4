"""Compare scheduling policies on a fleet that is not there: ``python -m launch.simulate gpus=64 seeds=0,1,2``.

Owns the options, the table and the record. The decisions are those of the service's own dispatcher, the times are
computed (`rollout/simulate/`): from the roofline of the accelerator, or from measured steps (costs=FILE).

Every policy runs without speculation: what scheduling alone brings. Those that are `speculating` run again for each
`acceptance`, as they are shipped, with as many drafts in each step as pay; spec_draft_tokens=… and
spec_accept_length=… put another acceptance in the place of the published ones.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from launch.arguments import split_arguments
from launch.simulate_picture import draw
from rollout.errors import InvalidRequest
from rollout.simulate.costs import ACCELERATORS, RooflineCosts, StepCosts
from rollout.simulate.lengths import GroupWork, LengthModel, draw_groups, read_trace
from rollout.simulate.measured import MeasuredCosts, read_steps
from rollout.simulate.outcome import Outcome, Run
from rollout.simulate.scenario import POLICIES, Scenario, check_policies
from rollout.simulate.simulation import Simulation
from rollout.simulate.speculation import PUBLISHED, Acceptance


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Beside those of the scenario and of the distribution of lengths.

    Attributes:
        policies: To compare; speed-ups are over static and partial, or over the first.
        seeds: Each is a run of every policy; the table shows means, the record has all.
        accelerator: A key of ACCELERATORS; the model is Qwen3-235B-A22B in INT4 with INT8 KV.
        costs: JSON file of measured steps to price steps by instead; kv_tokens must then be given.
        trace: JSONL file of real lengths to replay instead of drawing them.
        speculating: Policies that are run with speculation too.
        acceptance: Of the drafts, each a run more: names of rollout.simulate.speculation.PUBLISHED.
        out: Where the record goes, as JSON.
        picture: Where the picture of the first seed goes, as PNG.
    """

    policies: tuple[str, ...] = POLICIES
    seeds: tuple[int, ...] = (0,)
    accelerator: str = "h200"
    costs: str | None = None
    trace: str | None = None
    speculating: tuple[str, ...] = ("divided",)
    acceptance: tuple[str, ...] = ("eagle3-rl", "eagle3-235b")
    out: str | None = None
    picture: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A policy without speculation, or with what its drafts are assumed to bring."""

    policy: str
    acceptance: Acceptance | None = None

    @property
    def name(self) -> str:
        return self.policy if self.acceptance is None else f"{self.policy} + {self.acceptance.name}"

    def scenario(self, base: Scenario) -> Scenario:
        """The scenario, speculating as the row does."""
        if self.acceptance is None:
            return replace(base, spec_accept_length=1.0, spec_draft_tokens=0)
        length, drafts = self.acceptance.accept_length, self.acceptance.num_drafts
        return replace(base, spec_accept_length=length, spec_draft_tokens=drafts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """All that a simulation needs, checked."""

    options: Options
    rows: tuple[Row, ...]
    scenario: Scenario
    lengths: LengthModel
    costs: StepCosts
    kv_tokens: int
    trace: tuple[GroupWork, ...] | None


def parse(arguments: Sequence[str]) -> Request:
    """Read and check the command line.

    Raises:
        InvalidRequest: An unknown option, a wrong value, an unusable file, or options that exclude each other.
    """
    options, rest = split_arguments(Options, arguments)
    lengths, rest = split_arguments(LengthModel, rest)
    scenario, rest = split_arguments(Scenario, rest)
    if rest:
        names = ", ".join(f.name for kind in (Options, Scenario, LengthModel) for f in fields(kind))
        raise InvalidRequest("argument", rest[0], f"one of {names}")
    check_policies(options.policies)
    if not set(options.speculating) <= set(POLICIES):
        raise InvalidRequest("speculating", ",".join(options.speculating), f"some of {','.join(POLICIES)}")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise InvalidRequest("seeds", options.seeds, "at least one, each once")
    if any(a.startswith("seed=") for a in arguments):
        raise InvalidRequest("seed", scenario.seed, "seeds=…")
    trace = None if options.trace is None else tuple(read_trace(Path(options.trace)))
    if trace is not None:
        scenario = _fit_to(scenario, trace)
    costs, kv_tokens = _costs(options, scenario)
    if kv_tokens < scenario.longest:
        raise InvalidRequest("kv_tokens", kv_tokens, f"at least the longest trajectory, {scenario.longest}")
    return Request(
        options=options,
        rows=_rows(options, scenario),
        scenario=scenario,
        lengths=lengths,
        costs=costs,
        kv_tokens=kv_tokens,
        trace=trace,
    )


def _rows(options: Options, scenario: Scenario) -> tuple[Row, ...]:
    known = {one.name: one for one in PUBLISHED}
    if not set(options.acceptance) <= set(known):
        raise InvalidRequest("acceptance", ",".join(options.acceptance), f"some of {','.join(known)}")
    assumed = [known[name] for name in options.acceptance]
    if scenario.spec_draft_tokens:
        length, drafts = scenario.spec_accept_length, scenario.spec_draft_tokens
        assumed = [Acceptance(name=f"{length:g} of {drafts}", accept_length=length, num_drafts=drafts, source="given")]
    alone = [Row(policy=policy) for policy in options.policies]
    shipped = [Row(policy=p, acceptance=one) for p in options.policies if p in options.speculating for one in assumed]
    rows = (*alone, *shipped)
    for row in rows:
        row.scenario(scenario)  # what cannot be simulated is refused here
    return rows


def _fit_to(scenario: Scenario, trace: Sequence[GroupWork]) -> Scenario:
    sizes = {len(group.output_tokens) for group in trace}
    if len(sizes) > 1:
        raise InvalidRequest("trace", f"groups of {sorted(sizes)} members", "groups of one size")
    longest = max(max(group.output_tokens) for group in trace)
    if longest > scenario.output_tokens:
        raise InvalidRequest("output_tokens", scenario.output_tokens, f"at least the trace's longest, {longest}")
    if len(trace) % scenario.rl_steps:
        raise InvalidRequest("rl_steps", scenario.rl_steps, f"a divisor of the trace's {len(trace)} groups")
    return replace(
        scenario,
        prompts=len(trace) // scenario.rl_steps,
        n_samples_per_prompt=sizes.pop(),
        prompt_tokens=max(group.prompt_tokens for group in trace),
    )


def _costs(options: Options, scenario: Scenario) -> tuple[StepCosts, int]:
    if options.costs is not None:
        if scenario.kv_tokens is None:
            raise InvalidRequest("kv_tokens", None, "the KV of a shard in tokens, where costs= are measured")
        return MeasuredCosts(read_steps(Path(options.costs))), scenario.kv_tokens
    accelerator = ACCELERATORS.get(options.accelerator)
    if accelerator is None:
        raise InvalidRequest("accelerator", options.accelerator, f"one of {', '.join(ACCELERATORS)}")
    costs = RooflineCosts(scenario.shards_per_group, accelerator)
    return costs, scenario.kv_tokens or costs.kv_tokens()


def work(request: Request, scenario: Scenario) -> Iterator[GroupWork]:
    """The groups of a run, the same for every policy."""
    if request.trace is not None:
        yield from request.trace
        return
    rng = np.random.default_rng([scenario.seed, 0])
    step = 0
    while True:
        yield from draw_groups(
            request.lengths,
            rng,
            step,
            scenario.prompts,
            scenario.n_samples_per_prompt,
            scenario.prompt_tokens,
            scenario.output_tokens,
        )
        step += 1


def simulate(request: Request, say: Callable[[str], None]) -> dict[str, list[Run]]:
    """Run every row with every seed."""
    runs: dict[str, list[Run]] = {row.name: [] for row in request.rows}
    for seed in request.options.seeds:
        for row in request.rows:
            scenario = row.scenario(replace(request.scenario, seed=seed))
            run = Simulation(scenario, row.policy, request.costs, request.kv_tokens, work(request, scenario)).run()
            runs[row.name].append(run)
            say(f"{row.name}, seed {seed}: {run.outcome.makespan_s:,.0f} s, simulated in {run.outcome.wall_s:.1f} s")
    return runs


def mean(runs: Sequence[Run], name: str) -> float:
    """Mean over seeds of a figure of the outcome."""
    return statistics.fmean(getattr(run.outcome, name) for run in runs)


def speedups(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    """Makespan of the first row by that of each, seed by seed."""
    first = next(iter(runs.values()))
    return {
        policy: [a.outcome.makespan_s / b.outcome.makespan_s for a, b in zip(first, mine, strict=True)]
        for policy, mine in runs.items()
    }


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("makespan", "makespan_s", "{:,.0f} s"),
    ("tokens/s/GPU", "tokens_per_s_per_gpu", "{:,.0f}"),
    ("tail", "tail_ratio", "{:.0%}"),
    ("batch", "mean_batch", "{:.1f}"),
    ("idle", "idle_share", "{:.0%}"),
    ("prefilled again", "num_reprefilled_tokens", "{:,.0f}"),
    ("preempted", "num_preemptions", "{:,.0f}"),
    ("migrated", "num_migrations", "{:,.0f}"),
    ("p50", "latency_p50_s", "{:,.0f} s"),
    ("p99", "latency_p99_s", "{:,.0f} s"),
    ("decisions/CPU s", "decisions_per_cpu_s", "{:,.0f}"),
)


def table(request: Request, runs: dict[str, list[Run]], title: str) -> Table:
    """Scheduling alone, then with speculation: one line for each policy, means over seeds."""
    alone = [row.name for row in request.rows if row.acceptance is None]
    bases = [name for name in ("static", "partial") if name in alone] or alone[:1]
    result = Table(title=title, title_justify="left")
    result.add_column("policy")
    for base in bases:
        result.add_column(f"vs {base}", justify="right")
    for heading, _, _ in COLUMNS:
        result.add_column(heading, justify="right")
    for number, row in enumerate(request.rows):
        if number == len(alone):
            result.add_section()
        cells = [form.format(mean(runs[row.name], name)) for _, name, form in COLUMNS]
        result.add_row(row.name, *(_ratio(runs[base], runs[row.name]) for base in bases), *cells)
    return result


def _ratio(base: Sequence[Run], mine: Sequence[Run]) -> str:
    ratios = [a.outcome.makespan_s / b.outcome.makespan_s for a, b in zip(base, mine, strict=True)]
    spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.fmean(ratios):.2f} ×{spread}"


def sources(request: Request) -> list[str]:
    """What the rows with speculation assume, and from where."""
    assumed = {row.acceptance.name: row.acceptance for row in request.rows if row.acceptance is not None}
    return [
        f"{one.name}: {one.accept_length:g} tokens a step with {one.num_drafts} drafts ({one.source}); "
        "in each step as many drafts as pay"
        for one in assumed.values()
    ]


def record(request: Request, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """What is written as JSON."""
    outcomes: dict[str, list[Outcome]] = {policy: [run.outcome for run in mine] for policy, mine in runs.items()}
    fit = asdict(request.costs.error) if isinstance(request.costs, MeasuredCosts) else None
    return {
        "options": asdict(request.options),
        "scenario": asdict(request.scenario),
        "lengths": None if request.trace is not None else asdict(request.lengths),
        "kv_tokens": request.kv_tokens,
        "fit_error": fit,
        "makespan_speedup": speedups(runs),
        "acceptance": {row.name: asdict(row.acceptance) for row in request.rows if row.acceptance is not None},
        "outcomes": {policy: [asdict(outcome) for outcome in mine] for policy, mine in outcomes.items()},
    }


def title(request: Request) -> str:
    """What was simulated, in a line."""
    s = request.scenario
    sizes = f"{s.prompts:,} × {s.n_samples_per_prompt} trajectories of {s.prompt_tokens:,} + {s.output_tokens:,} tokens"
    steps = f", {s.rl_steps} steps" if s.rl_steps > 1 else ""
    stale = f", over-sampling {s.over_sampling:g}, staleness {s.max_staleness}" if s.max_staleness else ""
    return f"{s.gpus:,} GPUs, {sizes}{steps}{stale}"


def main(arguments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.WARNING)
    try:
        request = parse(arguments)
    except InvalidRequest as error:
        print(f"launch.simulate: {error}", file=sys.stderr)
        return 2
    runs = simulate(request, lambda line: print(line, flush=True))
    Console(width=180).print(table(request, runs, title(request)))
    for line in sources(request):
        print(line)
    if isinstance(request.costs, MeasuredCosts):
        fit = request.costs.error
        print(f"fit of {fit.num_steps} steps: {fit.mean_relative:.1%} off on average, p95 {fit.p95_relative:.1%}")
    if request.options.out is not None:
        Path(request.options.out).write_text(json.dumps(record(request, runs), indent=1))
    if request.options.picture is not None:
        draw({policy: mine[0] for policy, mine in runs.items()}, Path(request.options.picture), title(request))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
