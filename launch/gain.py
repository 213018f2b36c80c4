"""What finished runs have learned, on more held-out problems than they were evaluated on.

    python -m launch.gain runs=runs/demo,runs/int4 problems=2048 out=gain.json

For each run, with the engine it trained with: its first weights answer the problems, then those of its newest
checkpoint, published to the engines as in the run. Gains are compared with the first run's, on the same problems and
seeds. Nothing is written into the runs. Exit code 1 where a run gains less than `min_ratio` of the first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import ray

from launch.arguments import split_arguments
from launch.cluster import start_ray
from launch.compose import read_yaml
from launch.evaluation import Evaluation
from launch.monitor import Monitor
from launch.train import evaluate, publish, service_of, trainers_of
from launch.workload import Workload
from rollout.config import RunConfig
from rollout.errors import CheckpointBroken, InvalidRequest, LongrollError

NUM_RESAMPLES = 10_000
RESAMPLING_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is compared.

    Attributes:
        runs: Directories of finished runs; the first is what the others are measured by.
        problems: Held-out problems.
        min_ratio: Smallest share of the first run's gain that passes.
        out: JSON file for the result.
    """

    runs: tuple[str, ...] = ()
    problems: int = 2048
    min_ratio: float = 0.95
    out: str | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise InvalidRequest("runs", self.runs, "one or more directories of finished runs, joined by commas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Rewards of a run's first and last weights; `low` and `high` bound the ratio of gains (95 %, paired bootstrap)."""

    run: str
    step: int
    reward_before: float
    reward_after: float
    gain: float
    ratio: float
    low: float
    high: float


def config_of(run_dir: Path, problems: int) -> RunConfig:
    """The configuration a run was started with, for more problems and without W&B.

    Raises:
        InvalidRequest: There is no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise InvalidRequest("runs", run_dir, "the directory of a run, with its config.yaml")
    config = read_yaml(path)
    config.workload.eval_problems, config.monitor.wandb_mode = problems, "disabled"
    config.journal.dsn = None
    return config


def scores(run_dir: Path, problems: int) -> tuple[int, Evaluation, Evaluation]:
    """Steps that a run has learned, and its answers before the first and after the last.

    Raises:
        CheckpointBroken: The run has no checkpoint.
    """
    config = config_of(run_dir, problems)
    start_ray(config)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            monitor = Monitor(config.monitor, Path(scratch), {}, 0)
            try:
                workload = Workload(config.workload, config.model, config.trainer.seed)
                with service_of(config, monitor) as service:
                    before = evaluate(config, service.client, workload, 0, monitor)
                    with trainers_of(config, run_dir, service.controller) as trainers:
                        cursor = trainers.load_latest()
                        if cursor is None:
                            raise CheckpointBroken(f"{run_dir}: got no checkpoint, expected one to publish")
                        publish(config, service.client, trainers, monitor)
                    return cursor.step, before, evaluate(config, service.client, workload, cursor.version, monitor)
            finally:
                monitor.finish()
    finally:
        ray.shutdown()


def gains(before: Evaluation, after: Evaluation) -> np.ndarray:
    """Gain of each problem; one that failed counts as unanswered."""
    return np.array([(a or 0.0) - (b or 0.0) for b, a in zip(before.rewards, after.rewards, strict=True)])


def ratio_interval(first: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """95 % interval of mean(other) / mean(first), problems drawn together: percentile bootstrap (Efron, 1979)."""
    random = np.random.default_rng(RESAMPLING_SEED)
    drawn = random.integers(0, len(first), size=(NUM_RESAMPLES, len(first)))
    ratios = other[drawn].mean(axis=1) / first[drawn].mean(axis=1)
    return float(np.percentile(ratios, 2.5)), float(np.percentile(ratios, 97.5))


def compare(options: Options) -> list[Gain]:
    """Evaluate the runs one after another."""
    results: list[Gain] = []
    first: np.ndarray | None = None
    for run in options.runs:
        step, before, after = scores(Path(run).resolve(), options.problems)
        gained = gains(before, after)
        first = gained if first is None else first
        low, high = ratio_interval(first, gained)
        ratio = float(gained.mean() / first.mean())
        results.append(
            Gain(
                run=Path(run).name,
                step=step,
                reward_before=before.reward,
                reward_after=after.reward,
                gain=float(gained.mean()),
                ratio=ratio,
                low=low,
                high=high,
            )
        )
        print(_line(results[-1]), flush=True)
    return results


def _line(gain: Gain) -> str:
    return (
        f"{gain.run:<16} step {gain.step:>4}  reward {gain.reward_before:.4f} → {gain.reward_after:.4f}  "
        f"gain {gain.gain:.4f}  {gain.ratio:.1%} of the first [{gain.low:.1%}, {gain.high:.1%}]"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        if overrides:
            raise InvalidRequest("arguments", " ".join(overrides), "no overrides: a run's configuration is its own")
        for run in options.runs:
            config_of(Path(run), options.problems)  # bad input shows before anything starts
        results = compare(options)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if options.out is not None:
        record = {"options": asdict(options), "gains": [asdict(gain) for gain in results]}
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(gain.ratio >= options.min_ratio for gain in results) else 1


if __name__ == "__main__":
    sys.exit(main())
