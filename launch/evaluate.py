"""Accuracy regression: the same problems and seeds under a baseline and under each quantised setting.

    python -m launch.evaluate experiment=tiny_grpo settings=int4,int4+int8_kv problems=2048 out=eval.json
    python -m launch.evaluate experiment=qwen3_235b_rl_20k settings=int4+int8_kv tasks=gsm8k,math_500

A setting joins parts with "+": an activation dtype (fp32, bf16, fp16), int4 (weights), int8_kv (KV cache);
quantised settings compute in bfloat16 unless they name a dtype. Everything else is the experiment's, with
Hydra overrides as for launch.train. Since sampling is keyed by (seed, position), the two answers to a problem
differ only by what the setting changes, and their difference is paired.

With `tasks` the problems are lm-eval's (extra package `lm-eval`), otherwise the experiment's own workload.

Exit code: 0 if no setting loses more than `max_loss` points, 1 if one does, 2 for bad input.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray

from actors.service import start_service
from launch.arguments import split_arguments
from launch.cluster import model_path, start_ray
from launch.compose import compose
from launch.evaluation import Evaluation
from launch.monitor import Monitor
from launch.train import evaluate
from launch.workload import Workload
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NORMAL_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
MIN_PAIRS = 30  # below this the normal interval of a mean says little


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What this command adds to the experiment's configuration.

    Attributes:
        baseline: Setting that the others are compared with.
        settings: Those others.
        problems: Problems of the workload; ignored with `tasks`.
        max_loss: Largest loss of accuracy, in points (hundredths), that still passes.
        tasks: lm-eval tasks instead of the workload.
        out: JSON file for the result.
    """

    baseline: str = "bf16"
    settings: tuple[str, ...] = ("int4+int8_kv",)
    problems: int = 1024
    max_loss: float = 1.0
    tasks: tuple[str, ...] = ()
    out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A setting against the baseline on the same problems; differences and their 95 % interval in points.

    Attributes:
        accuracy, baseline_accuracy: Shares of problems answered exactly right.
        difference: Of the accuracies; negative is a loss.
        low, high: Interval of the difference (normal, from the paired differences).
        num_problems: Answered under both.
        num_changed: Of them, right under one and wrong under the other.
        reward_difference: Of the mean rewards, as is.
    """

    setting: str
    accuracy: float
    baseline_accuracy: float
    difference: float
    low: float
    high: float
    num_problems: int
    num_changed: int
    reward_difference: float
    duration_s: float


def with_setting(config: RunConfig, setting: str) -> RunConfig:
    """The experiment with the engine of a setting.

    Raises:
        InvalidRequest: For a part that is not known or named twice.
    """
    parts = setting.split("+")
    unknown = [part for part in parts if part not in (*DTYPES, "int4", "int8_kv")]
    dtypes = [DTYPES[part] for part in parts if part in DTYPES]
    if unknown or len(dtypes) > 1 or len(set(parts)) != len(parts):
        raise InvalidRequest("setting", setting, "one of fp32, bf16, fp16, with int4 or int8_kv joined to it by +")
    changed = copy.deepcopy(config)
    engine = changed.engine
    engine.dtype = dtypes[0] if dtypes else "bfloat16"
    engine.quantization = "int4" if "int4" in parts else None
    engine.kv_cache_dtype = "int8_per_token_head" if "int8_kv" in parts else "auto"
    return changed


def compare(setting: str, baseline: Evaluation, other: Evaluation) -> Comparison:
    """Paired difference of exact answers; problems that failed under either are left out.

    Raises:
        LongrollError: Too few problems were answered under both.
    """
    pairs = [
        (bool(b), bool(o)) for b, o in zip(baseline.exact, other.exact, strict=True) if b is not None and o is not None
    ]
    if len(pairs) < MIN_PAIRS:
        raise LongrollError(f"{setting}: got {len(pairs)} problems answered under both, expected at least {MIN_PAIRS}")
    differences = [float(o) - float(b) for b, o in pairs]
    mean = statistics.fmean(differences)
    half = NORMAL_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    return Comparison(
        setting=setting,
        accuracy=statistics.fmean(float(o) for _, o in pairs),
        baseline_accuracy=statistics.fmean(float(b) for b, _ in pairs),
        difference=100 * mean,
        low=100 * (mean - half),
        high=100 * (mean + half),
        num_problems=len(pairs),
        num_changed=sum(b != o for b, o in pairs),
        reward_difference=other.reward - baseline.reward,
        duration_s=other.duration_s,
    )


def answers(config: RunConfig, options: Options, monitor: Monitor) -> Evaluation:
    """Start the engines of a configuration, answer every problem, and stop them."""
    with start_service(config.model, config.engine, config.scheduler, config.sync, config.cluster) as service:
        if options.tasks:
            from launch.lm_eval_model import evaluate_tasks

            return evaluate_tasks(config, service.client, options.tasks)
        workload = Workload(config.workload, config.model, config.trainer.seed)
        return evaluate(config, service.client, workload, 0, monitor)


def run(config: RunConfig, options: Options) -> list[Comparison]:
    """Answer the problems under every setting, one after another."""
    settings = (options.baseline, *options.settings)
    configs = [with_setting(config, setting) for setting in settings]  # bad input shows before anything starts
    monitor = Monitor(config.monitor, Path(config.run_dir), {}, len(settings))
    start_ray(config)
    results: list[Evaluation] = []
    try:
        for setting, changed in zip(settings, configs, strict=True):
            monitor.say(f"{setting}: starting {changed.engine.num_all_shards} shards")
            results.append(answers(changed, options, monitor))
            monitor.say(f"{setting}: exact {results[-1].exact_rate:.4f}, reward {results[-1].reward:.4f}")
    finally:
        monitor.finish(exit_code=0)
        ray.shutdown()
    return [compare(s, results[0], r) for s, r in zip(settings[1:], results[1:], strict=True)]


def table(comparisons: Sequence[Comparison], options: Options) -> str:
    lines = [
        f"{'setting':<16} {'exact':>7} {'baseline':>9} {'points':>8} {'95 % interval':>18} {'changed':>9}  verdict"
    ]
    for c in comparisons:
        verdict = "ok" if -c.difference <= options.max_loss else f"loses more than {options.max_loss:g}"
        interval = f"[{c.low:+.2f}, {c.high:+.2f}]"
        changed = f"{c.num_changed}/{c.num_problems}"
        lines.append(
            f"{c.setting:<16} {c.accuracy:>7.4f} {c.baseline_accuracy:>9.4f} {c.difference:>+8.2f} {interval:>18} "
            f"{changed:>9}  {verdict}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        config = compose([*overrides, f"workload.eval_problems={options.problems}", "monitor.wandb_mode=disabled"])
        config.model.path = model_path(config.model.path)
        comparisons = run(config, options)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(table(comparisons, options))
    if options.out is not None:
        record = {"options": asdict(options), "comparisons": [asdict(c) for c in comparisons]}
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(-c.difference <= options.max_loss for c in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
