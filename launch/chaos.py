"""Kills everything that a training run consists of, again and again, and shows that nothing is lost.

    python -m launch.chaos [experiment=tiny_grpo] [kills=50] [seed=0] [steps=…] [dir=…] [out=PATH] [overrides …]

A training run is started as a process of its own. Whenever it goes on, one of its processes (shard, engine core,
controller, reward worker, trainer rank, driver) gets a SIGKILL or a SIGSTOP, drawn by `seed`. What is
supervised must come back by itself; where the run ends, it is started again, as a job controller would. Then the same
configuration runs undisturbed, and both are compared.

    num_lost                  trajectories of used groups that are missing                                 target 0
    num_duplicated            groups learned from twice, kept under two keys, or acknowledged wrongly      target 0
    num_different             trajectories that differ from the undisturbed run's, near ties apart         target 0
    num_failed                trajectories that failed, by reason in `failures`                            target 0
    num_stuck                 kills after which the run did not go on within `recovery_s`                  target 0
    regenerated_token_ratio   (tokens sampled by all engines - durable tokens) / durable tokens            target 0.03

With `dir`, a campaign that was interrupted goes on where it was. Exit code 0 if all targets were met.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.arguments import split_arguments
from launch.chaos_campaign import POLL_S, Bounds, Campaign, Kill, line
from launch.chaos_operator import Life, Operator
from launch.chaos_verdict import Ledger, Ties, failures, num_duplicated, num_lost, read_ledger, sameness
from launch.chaos_victims import numbers_of
from launch.compose import compose
from launch.counting_scheduler import FOLDER_KEY, CountingAsyncScheduler, CountingScheduler
from launch.near_ties import near_tie
from launch.token_counts import total_tokens
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError

STEPS_PER_KILL = 3
MAX_REGENERATED = 0.03
SHORT = (
    "trainer.prompts_per_step=4",
    "trainer.checkpoint_every=2",
    "trainer.keep_checkpoints=1000000",  # their cursors are the history that is checked
    "sampling.n_samples_per_prompt=4",
    "scheduler.chunk_tokens=8",  # outputs are some dozen tokens long
    "scheduler.num_reward_workers=1",  # one that is stopped while idle would not be missed
    "supervisor.hang_timeout_s=15",
    "sync.timeout_s=20",
    "workload.eval_problems=8",
    "monitor.picture=false",
    "monitor.wandb_mode=disabled",
    "monitor.progress=plain",
)
"""Steps of seconds, and deaths that are noticed in seconds; overrides come after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The campaign.

    Attributes:
        kills: How many.
        seed: Decides who is killed, how and when.
        steps: Of training; None = three for each kill.
        gap_s: Kills are spread over the steps, each at random within so many seconds after its turn has come.
        notice_s: After which a stopped driver or trainer rank is killed.
        recovery_s: Longest time until the run must go on.
        dir: Of both runs, kept; None = a temporary one.
        out: JSON file for the result.
    """

    kills: int = 50
    seed: int = 0
    steps: int | None = None
    gap_s: float = 15.0
    notice_s: float = 15.0
    recovery_s: float = 600.0
    dir: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if self.kills < 0:
            raise InvalidRequest("kills", self.kills, "an integer ≥ 0")

    @property
    def num_steps(self) -> int:
        return self.steps if self.steps is not None else max(1, STEPS_PER_KILL * self.kills)


def overrides_of(options: Options, overrides: Sequence[str]) -> list[str]:
    """Those of both runs, where they lie left out."""
    chosen = [*SHORT, f"trainer.num_steps={options.num_steps}", *overrides]
    if not any(override.startswith("experiment=") for override in overrides):
        chosen = ["experiment=tiny_grpo", *chosen]
    return chosen


def counted(overrides: Sequence[str], config: RunConfig, folder: Path) -> list[str]:
    """Overrides with which the engines count their tokens in a folder."""
    scheduler = CountingAsyncScheduler if config.cluster.num_gpus_per_node else CountingScheduler
    name = f"{scheduler.__module__}.{scheduler.__name__}"
    return [
        *overrides,
        f"engine.vllm.scheduler_cls={name}",
        f"engine.vllm.additional_config.{FOLDER_KEY}={folder}",
    ]


def campaign(options: Options, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Both runs and their comparison, as the record that is written."""
    overrides = overrides_of(options, overrides)
    config = compose(overrides)
    bounds = Bounds(max_delay_s=options.gap_s, notice_s=options.notice_s, recovery_s=options.recovery_s)
    counts = folder / "disturbed-tokens"
    with Operator(counted(overrides, config, counts), folder / "disturbed") as operator:
        kills = Campaign(operator, numbers_of(config), options.seed, bounds, folder / "kills.jsonl", _say)
        kills.run(options.kills, config.trainer.num_steps)
        lives = operator.lives
    disturbed = read_ledger(operator.run_dir, operator.journal)
    num_generated = total_tokens(counts)
    _say("the same without disturbance")
    with Operator(counted(overrides, config, folder / "undisturbed-tokens"), folder / "undisturbed") as operator:
        operator.finish(POLL_S)
    undisturbed = read_ledger(operator.run_dir, operator.journal)
    figures = figures_of(config, disturbed, undisturbed, num_generated)
    return {"options": asdict(options), "overrides": overrides} | figures | record_of(kills.kills, lives)


def figures_of(config: RunConfig, disturbed: Ledger, undisturbed: Ledger, num_generated: int) -> dict[str, Any]:
    """What both runs have to show."""
    trainer, sampling = config.trainer, config.sampling
    num_groups = trainer.num_steps * trainer.prompts_per_step
    model = json.loads((Path(config.model.path) / "config.json").read_text())
    ties = Ties(
        temperature=sampling.temperature,
        vocab_size=model["vocab_size"],
        within=near_tie(config.engine.dtype or config.model.dtype, sampling.temperature),
    )
    same = sameness(disturbed, undisturbed, ties, trainer.prompts_per_step)
    failed = failures(disturbed)
    num_durable = disturbed.num_tokens
    return {
        "num_lost": num_lost(disturbed, num_groups, sampling.n_samples_per_prompt),
        "num_duplicated": num_duplicated(disturbed),
        "num_different": len(same.differences),
        "num_failed": sum(failed.values()),
        "num_trajectories": num_groups * sampling.n_samples_per_prompt,
        "num_compared": same.num_compared,
        "num_equal": same.num_equal,
        "num_near_ties": same.num_near_ties,
        "num_after_near_tie": same.num_after_near_tie,
        "num_tokens_durable": num_durable,
        "num_tokens_generated": num_generated,
        "regenerated_token_ratio": (num_generated - num_durable) / max(num_durable, 1),
        "failures": failed,
        "differences": list(same.differences),
    }


def record_of(kills: Sequence[Kill], lives: Sequence[Life]) -> dict[str, Any]:
    """The kills, and how long the run took to get over each kind."""
    recovery_s: dict[str, float] = {}
    for kind in sorted({kill.kind for kill in kills}):
        recovery_s[kind] = statistics.median(kill.recovery_s for kill in kills if kill.kind == kind)
    return {
        "num_kills": len(kills),
        "num_restarts": sum(kill.num_restarts for kill in kills),
        "num_stuck": sum(kill.is_stuck for kill in kills),
        "num_left": sum(kill.num_left for kill in kills) + sum(life.num_orphans for life in lives),
        "median_recovery_s": recovery_s,
        "max_recovery_s": max((kill.recovery_s for kill in kills), default=0.0),
        "kills": [asdict(kill) for kill in kills],
        "lives": [asdict(life) for life in lives],
    }


def is_good(record: dict[str, Any]) -> bool:
    """Whether all targets were met."""
    zeros = ("num_lost", "num_duplicated", "num_different", "num_failed", "num_stuck")
    is_whole = record["num_kills"] == record["options"]["kills"]
    return is_whole and not any(record[name] for name in zeros) and record["regenerated_token_ratio"] <= MAX_REGENERATED


def table(record: dict[str, Any]) -> str:
    """Every kill, then the figures."""
    rows = [line(Kill(**kill)) for kill in record["kills"]]
    rows += [
        f"run ended with {life['exit_code']}: {life['last_words']}" for life in record["lives"] if life["last_words"]
    ]
    rows += [f"failed {count} ×: {reason}" for reason, count in record["failures"].items()]
    rows += [f"different: {one}" for one in record["differences"]]
    return "\n".join(rows)


def _say(message: str) -> None:
    print(message, flush=True)


def _stop(number: int, frame: object) -> None:
    """End from wherever it is: the operator ends its run."""
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        with tempfile.TemporaryDirectory(prefix="longroll-chaos-") as temporary:
            folder = Path(options.dir or temporary).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            record = campaign(options, overrides, folder)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(table(record))
    plain = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    print(json.dumps(plain | {"median_recovery_s": record["median_recovery_s"]}, indent=2))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if is_good(record) else 1


if __name__ == "__main__":
    sys.exit(main())
