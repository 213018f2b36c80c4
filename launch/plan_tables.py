"""The planner's tables. Owns words and columns; computes nothing but shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.table import Table

from rollout.plan.calibration import Calibration, Compared
from rollout.plan.judge import Judged
from rollout.plan.ladder import Rung
from rollout.plan.requirements import Verdict
from rollout.plan.search import Plan, headroom, limit_of
from rollout.plan.training import StepPlan

GB = 1e9
PUBLISHED_COLUMNS = (
    "engine",
    "GPUs",
    "precision",
    "EP × TP",
    "in + out",
    "running",
    "published",
    "computed",
    "error",
    "without its source",
)
TERM_WORDS = {
    "fixed_s": "host",
    "attention_s": "attention, head",
    "scores_s": "prefill attention",
    "kv_s": "KV",
    "experts_s": "experts",
    "exchange_s": "all-to-all",
    "reduce_s": "all-reduce",
}


def plan_table(judged: Judged) -> Table:
    """A plan: what is configured, held and reached, and where a step's time goes."""
    workload, fleet = judged.workload, judged.fleet
    sizes = f"{workload.prompt_tokens:,} + {workload.output_tokens:,} tokens (mean {workload.mean_output:,.0f})"
    table = Table(title=f"{workload.name}: {sizes} on {fleet.num_gpus} × {fleet.gpu.name}", title_justify="left")
    table.add_column("what")
    table.add_column("planned")
    plan = judged.plan
    if plan is None:
        table.add_row("plan", "none: the model fits in no group of these GPUs")
        return table
    for name, value in _lines(plan, judged):
        table.add_row(name, value)
    return table


def _lines(plan: Plan, judged: Judged) -> list[tuple[str, str]]:
    candidate, ledger, steady, fleet = plan.candidate, plan.ledger, plan.steady, judged.fleet
    groups = fleet.num_gpus // candidate.ranks
    draft = candidate.draft
    speculation = (
        f"chains of {draft.num_tokens}, {draft.accept_length:.2f} tokens a step" if draft.num_tokens else "off"
    )
    parts = [(TERM_WORDS[f.name], getattr(steady.terms, f.name)) for f in fields(steady.terms)]
    parts.append(("drafting", steady.draft_s))
    shares = ", ".join(f"{name} {seconds / steady.step_s:.0%}" for name, seconds in parts if seconds > 0)
    flip = f" + {ledger.flip / GB:.0f} for a flip" if ledger.flip else ""
    beside = f"{ledger.weights / GB:.1f} weights + {ledger.workspace / GB:.0f} workspace{flip}"
    return [
        ("groups", f"{groups} of {candidate.ranks} GPUs, tensor parallel {candidate.tensor_ranks}"),
        ("precision, all-to-all", f"{candidate.precision.name}, {candidate.exchange}"),
        ("batch, tokens a step", f"{candidate.batch} sequences a GPU, {candidate.chunk:,} tokens"),
        ("speculation", speculation),
        ("memory of a GPU", f"{beside} + {ledger.kv / GB:.0f} KV = {ledger.limit / GB:.0f} GB"),
        ("KV of a GPU", f"{ledger.kv_tokens:,} tokens of {ledger.kv_token:,} bytes"),
        (
            "first token, 95th percentile",
            f"{steady.ttft_s * 1e3:,.0f} ms (a prompt alone {steady.prefill_s * 1e3:,.0f})",
        ),
        ("token", f"{steady.tpot_s * 1e3:.1f} ms, longest gap {steady.longest_step_s * 1e3:,.0f} ms"),
        ("throughput", f"{steady.tokens_per_s_per_gpu:,.0f} tokens/s a GPU"),
        ("a step", f"{steady.step_s * 1e3:.1f} ms: {shares}"),
        ("limited by", limit_of(plan)),
        ("headroom", f"{headroom(plan, fleet, judged.workload):.1f} × if the data sheet were reached in full"),
    ]


def ladder_table(rungs: Sequence[Rung], judged: Judged) -> Table:
    """What each optimisation brings, under the same targets."""
    table = Table(title="what each brings, best configuration of each", title_justify="left")
    for name in ("with", "EP × TP", "batch", "chunk", "drafts", "first token", "token", "tokens/s/GPU", "× bf16"):
        table.add_column(name, justify="left" if name == "with" else "right")
    plain = rungs[0].plan
    for rung in rungs:
        plan = rung.plan
        if plan is None:
            table.add_row(rung.name, "does not fit")
            continue
        candidate, steady = plan.candidate, plan.steady
        ratio = steady.tokens_per_s_per_gpu / plain.steady.tokens_per_s_per_gpu if plain else None
        table.add_row(
            rung.name,
            f"{candidate.ranks} × {candidate.tensor_ranks}",
            f"{candidate.batch}",
            f"{candidate.chunk:,}",
            f"{candidate.draft.num_tokens}",
            f"{steady.ttft_s * 1e3:,.0f} ms",
            f"{steady.tpot_s * 1e3:.1f} ms",
            f"{steady.tokens_per_s_per_gpu:,.0f}",
            "-" if ratio is None else f"{ratio:.2f}",
        )
    return table


def verdict_table(rows: Sequence[Verdict]) -> Table:
    """Requirements of one scenario on one fleet."""
    table = Table(title="requirements (planned)", title_justify="left")
    for name in ("requirement", "target", "planned", "holds", "limited by", "note"):
        table.add_column(name)
    for row in rows:
        table.add_row(row.requirement, row.target, row.shown, _mark(row), row.limit, row.note)
    return table


def survey_table(rows: Sequence[Verdict]) -> Table:
    """A line for each scenario and kind of GPU."""
    first = {row.requirement: row.target for row in rows}
    table = Table(title="which requirements hold, on the fewest GPUs where most do (planned)", title_justify="left")
    for name in (
        "scenario",
        "hardware",
        *(f"{name} {target}" for name, target in first.items()),
        "what does not, or the largest part",
    ):
        table.add_column(name)
    keys = dict.fromkeys((row.scenario, row.hardware) for row in rows)
    for scenario, hardware in keys:
        mine = {r.requirement: r for r in rows if (r.scenario, r.hardware) == (scenario, hardware)}
        cells = [f"{_mark(row)}: {row.shown}" for row in mine.values()]
        failing = next((row for row in mine.values() if not row.holds), mine["tpot"])
        table.add_row(scenario, hardware, *cells, f"{failing.requirement}: {failing.note or failing.limit}")
    table.caption = "close: the target lies within the error of the fit"
    table.caption_justify = "left"
    return table


def step_table(step: StepPlan, trajectories: int) -> Table:
    """Seconds and bytes of an RL step."""
    table = Table(title=f"an RL step of {trajectories:,} trajectories (planned)", title_justify="left")
    table.add_column("what")
    table.add_column("planned")
    none = "not asked for"
    rollout = none if step.rollout_s is None else f"{step.rollout_s:,.0f} s"
    train = none if step.train_s is None else f"{step.train_s:,.0f} s"
    for name, value in (
        ("rollouts, simulated with the dispatcher", rollout),
        ("rollouts at the steady speed, without a tail", f"{step.steady_s:,.0f} s"),
        ("one longest trajectory, alone", f"{step.longest_s:,.0f} s"),
        ("training, at the published speed", train),
        ("a step, one after the other", f"{step.synchronous_s:,.0f} s"),
        ("a step, overlapped (staleness 1)", f"{step.overlapped_s:,.0f} s"),
        ("weights of a full publication", f"{step.sync_bytes / GB:.0f} GB (bf16 {step.plain_sync_bytes / GB:.0f})"),
        ("  to a group, while it decodes", f"{step.sync_s:.1f} s"),
        ("  its flip, decoding stalled", f"{step.stall_s * 1e3:,.0f} ms"),
        ("routing recorded for replay", f"{step.routing_bytes} bytes a token, {step.packed_routing_bytes} packed"),
        ("  of a step", f"{step.step_routing_bytes / GB:.0f} GB"),
    ):
        table.add_row(name, value)
    return table


def published_table(compared: Sequence[Compared]) -> Table:
    """Every published figure beside the model's."""
    table = Table(title="speed against published figures: computed by published, less 1", title_justify="left")
    for name in PUBLISHED_COLUMNS:
        table.add_column(name)
    for one in compared:
        row = one.published
        is_time = row.tpot_s is not None
        figures = [row.figure, one.computed]
        texts = [f"{x * 1e3:.1f} ms" if is_time else f"{x:,.0f}/s a GPU" for x in figures]
        table.add_row(
            row.engine,
            f"{row.ranks} × {row.accelerator}",
            row.precision.name,
            f"{row.ranks} × {row.tensor_ranks}",
            f"{row.prompt_tokens:,} + {row.output_tokens:,}",
            "all that fit" if row.concurrency is None else f"{row.concurrency:g}",
            *texts,
            f"{one.error:+.0%}",
            f"{one.held_out_error:+.0%}",
        )
    for source in dict.fromkeys(one.published.source for one in compared):
        table.caption = f"{table.caption}\n{source}" if table.caption else source
    table.caption_justify = "left"
    return table


def calibration_line(found: Calibration) -> str:
    """What of the data sheets is reckoned with."""
    e = found.efficiency
    return (
        f"Computed, not measured. Of the data sheets: weights {e.memory:.0%}, KV {e.kv:.0%}, "
        f"arithmetic {e.compute:.0%}, links {e.link:.0%}; a collective {e.collective_s * 1e6:.0f} µs, "
        f"a step {e.step_s * 1e3:.1f} ms + {e.row_s * 1e6:.0f} µs a row. "
        f"Fitted to published speeds, ± {found.error:.0%}"
    )


def _mark(row: Verdict) -> str:
    return ("yes" if row.holds else "NO") + (", close" if row.is_close else "")
