"""What a model will do on a cluster, before anyone pays for it: computed, not measured.

    python -m launch.plan model=qwen3_235b cluster=h200_8x8 [workload=serving,rl_20k,rl_32k] [gpus=8,16,32,64]
    python -m launch.plan survey=a100,h20,h100,h200,b200           # which requirements hold, on how many of which GPU
    python -m launch.plan published=true                           # the model against published speeds
    python -m launch.plan workload=rl_20k out_experiment=conf/experiment/planned.yaml

For each workload: the best group size, batch, chunk and speculation under the targets, what limits it, what each
optimisation brings over bfloat16 on the same GPUs, and whether the requirements hold. `out` writes JSON, `picture` a
PNG. How much of a data sheet engines reach is fitted to published speeds (rollout/plan/calibration.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from launch.arguments import split_arguments
from launch.compose import CONF
from launch.plan_experiment import experiment_of
from launch.plan_picture import draw
from launch.plan_tables import (
    calibration_line,
    ladder_table,
    plan_table,
    published_table,
    step_table,
    survey_table,
    verdict_table,
)
from rollout.config import ClusterConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.memory import KV_INT8
from rollout.plan.calibration import calibrated, compare, root_mean_square
from rollout.plan.candidate import KV_NAMES, TENSOR_RANKS
from rollout.plan.judge import Judged, drafts, judge, own_choices
from rollout.plan.ladder import Rung, ladder
from rollout.plan.requirements import GPUS, Verdict, rows, verdicts
from rollout.plan.search import Fleet
from rollout.plan.shape import shape_of
from rollout.plan.training import Step, StepPlan, simulated_s, step_plan
from rollout.plan.workload import SCENARIOS, Targets, Workload
from rollout.simulate.accelerators import ACCELERATORS
from rollout.simulate.costs import Efficiency
from rollout.simulate.speculation import IN_RL

WIDTH = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is planned.

    Attributes:
        model: A file of conf/model, or a directory with config.json.
        cluster: A file of conf/cluster; its name begins with the accelerator.
        gpus: Numbers of GPUs to plan for instead of the cluster's.
        workload: Names of scenarios.
        accept_length, draft_tokens: Tokens that a sequence gains in a step with so many drafted ones.
        kv: Values of engine.kv_cache_dtype that are tried.
        imbalance: Rows of the busiest rank's experts, of the mean.
        prompts: Groups of a training step.
        trainer_gpus: Of the same kind; 0 leaves training out.
        simulate: Run a training step's rollouts through the simulator as well.
        draft_model: Directory of a draft model, for out_experiment; without one it is written without speculation.
        survey: Accelerators to judge all requirements on, instead of one cluster.
        published: Compare with published speeds instead.
        out: JSON file.
        picture: PNG file.
        out_experiment: YAML file for conf/experiment; of one workload.
    """

    model: str = "qwen3_235b"
    cluster: str = "h200_8x8"
    gpus: tuple[int, ...] = ()
    workload: tuple[str, ...] = tuple(w.name for w in SCENARIOS)
    accept_length: float = IN_RL.accept_length
    draft_tokens: int = IN_RL.num_drafts
    kv: tuple[str, ...] = (KV_INT8,)
    imbalance: float = 1.0
    prompts: int = 256
    trainer_gpus: int = 64
    simulate: bool = True
    draft_model: str | None = None
    survey: tuple[str, ...] = ()
    published: bool = False
    out: str | None = None
    picture: str | None = None
    out_experiment: str | None = None

    def __post_init__(self) -> None:
        known = [w.name for w in SCENARIOS]
        if not self.workload or not set(self.workload) <= set(known):
            raise InvalidRequest("workload", ",".join(self.workload), f"some of {','.join(known)}")
        if not self.kv or not set(self.kv) <= set(KV_NAMES):
            raise InvalidRequest("kv", ",".join(self.kv), f"some of {','.join(KV_NAMES)}")
        if self.imbalance < 1:
            raise InvalidRequest("imbalance", self.imbalance, "at least 1: the busiest by the mean")
        if self.out_experiment is not None and (len(self.workload) > 1 or len(self.gpus) > 1):
            raise InvalidRequest("out_experiment", self.out_experiment, "one workload=… and one number of gpus with it")

    @property
    def workloads(self) -> list[Workload]:
        return [w for w in SCENARIOS if w.name in self.workload]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A workload on a fleet, with all that is told of it; no step where there is no plan or no training."""

    judged: Judged
    rungs: list[Rung]
    rows: list[Verdict]
    step: StepPlan | None


def read_cluster(name: str) -> tuple[str, int]:
    """Accelerator and number of GPUs of a file in conf/cluster.

    Raises:
        InvalidRequest: No such file, one without GPUs, or one not named after an accelerator.
    """
    file = CONF / "cluster" / f"{name}.yaml"
    if not file.is_file():
        names = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise InvalidRequest("cluster", name, f"one of {', '.join(names)}")
    accelerator = name.split("_")[0]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(file)))
    assert isinstance(config, ClusterConfig)
    num_gpus = config.num_nodes * config.num_gpus_per_node
    if accelerator not in ACCELERATORS or not num_gpus:
        raise InvalidRequest("cluster", name, f"one with GPUs, named after one of {', '.join(ACCELERATORS)}")
    return accelerator, num_gpus


def model_path(name: str) -> str:
    """The path that a file of conf/model names, or the directory itself."""
    file = CONF / "model" / f"{name}.yaml"
    return str(OmegaConf.load(file).path) if file.is_file() else name


def plan(options: Options) -> list[Planned]:
    """Plan every workload for every number of GPUs."""
    shape = shape_of(model_path(options.model))
    accelerator, num_gpus = read_cluster(options.cluster)
    efficiency = efficiency_of(options)
    targets, speculated = Targets(), drafts(options.accept_length, options.draft_tokens)
    found = []
    for workload in options.workloads:
        for count in options.gpus or (num_gpus,):
            fleet = Fleet(gpu=ACCELERATORS[accelerator], num_gpus=count, efficiency=efficiency, shape=shape)
            choices = own_choices(workload, speculated, kv_dtypes=tuple(KV_NAMES[name] for name in options.kv))
            judged = judge(fleet, workload, targets, choices)
            found.append(
                Planned(
                    judged=judged,
                    rungs=ladder(fleet, workload, targets, speculated, TENSOR_RANKS),
                    rows=rows(judged, targets),
                    step=training_step(options, judged) if workload.is_training else None,
                )
            )
    return found


def efficiency_of(options: Options) -> Efficiency:
    return replace(calibrated().efficiency, imbalance=options.imbalance)


def training_step(options: Options, judged: Judged) -> StepPlan | None:
    if judged.plan is None:
        return None
    step = Step(prompts=options.prompts, trainer_gpus=options.trainer_gpus)
    parts = judged.plan, judged.fleet, judged.workload, step
    return step_plan(*parts, simulated_s(*parts) if options.simulate else None)


def tell(options: Options, console: Console) -> dict[str, Any]:
    """Plan and print; returns the record."""
    if options.published:
        compared = compare()
        console.print(published_table(compared))
        left_out = root_mean_square([1 + row.held_out_error for row in compared])
        console.print(f"{calibration_line(calibrated())}; with its source left out ± {left_out:.0%}")
        return {"published": [asdict(row) | {"error": row.error, "held_out": row.held_out_error} for row in compared]}
    if options.survey:
        shape = shape_of(model_path(options.model))
        speculated = drafts(options.accept_length, options.draft_tokens)
        efficiency, gpus = efficiency_of(options), options.gpus or GPUS
        found = verdicts(options.survey, gpus, options.workloads, efficiency, shape, speculated=speculated)
        console.print(survey_table(found))
        console.print(calibration_line(calibrated()))
        return {"survey": [asdict(row) for row in found]}
    planned = plan(options)
    for one in planned:
        console.print(plan_table(one.judged))
        console.print(ladder_table(one.rungs, one.judged))
        console.print(verdict_table(one.rows))
        if one.step is not None:
            console.print(step_table(one.step, options.prompts * one.judged.workload.group_size))
    console.print(calibration_line(calibrated()))
    if options.picture is not None:
        draw([one.judged for one in planned], Path(options.picture))
    if options.out_experiment is not None:
        text = experiment_of(planned[0].judged, options.cluster, options.model, options.draft_model)
        Path(options.out_experiment).write_text(text)
    return {"plans": [asdict(one) for one in planned]}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, rest = split_arguments(Options, arguments)
        if rest:
            raise InvalidRequest("argument", rest[0], "one of this command's own options, see --help")
        found = tell(options, Console(width=WIDTH))
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if options.out is not None:
        record = {"options": asdict(options), "calibration": asdict(calibrated()), **found}
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
