"""Does a draft keep up with a policy that learns?

    python -m launch.draft_drift [draft=DIR] [policies=grpo,restyle] [updates=20] [draft_steps=8] [out=PATH]

Takes updates on the target in one process, by GRPO, and once more towards another style (restyle: its own answers, with
other tokens for operators and line ends). After each, one copy of the draft takes a few distillation steps on the
update's own trajectories and hidden states; the other stays as it was. Both are measured at the temperature of sampling
on held-out prompts that the target of the moment answers anew.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from launch.arguments import split_arguments
from launch.compose import compose, model_directory
from launch.draft_policies import POLICIES
from launch.draft_rollouts import rollouts
from launch.draft_target import Target, load_target
from launch.workload import Workload
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError, check_positive
from rollout.speculation.clover import CloverDraft
from rollout.speculation.clover_config import load_draft
from rollout.speculation.clover_simulation import TreeShape, simulate_draft
from rollout.speculation.clover_training import DraftTrainer, DraftTrainingConfig
from rollout.speculation.tree import MAX_WIDTH
from rollout.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Beside overrides of the configuration, of which model, sampling, trainer and workload count.

    Attributes:
        draft: Directory of the draft; None = the model's own, /draft.
        policies: What the target learns, one after the other, from its first weights: grpo, restyle.
        restyle_lr: Step size of the target in restyle; in grpo it is trainer.lr.
        updates: Policy updates.
        measure_every: Updates between measurements; one comes before the first and one after the last.
        draft_steps: Distillation steps after each update.
        online_lr: Their step size.
        held_out: Held-out prompts of a measurement.
        width, depth: Of the trees measured.
        threads: CPU threads.
        out: JSON file for the measurements.
    """

    draft: str | None = None
    policies: tuple[str, ...] = ("grpo", "restyle")
    restyle_lr: float = 6.5e-4
    updates: int = 20
    measure_every: int = 5
    draft_steps: int = 8
    online_lr: float = 5e-4
    held_out: int = 128
    width: int = MAX_WIDTH
    depth: int = 5
    threads: int = 1
    out: str | None = None

    def __post_init__(self) -> None:
        if not self.policies or not set(self.policies) <= set(POLICIES):
            raise InvalidRequest("policies", ",".join(self.policies), f"some of {', '.join(POLICIES)}")
        sizes = {name: getattr(self, name) for name in ("updates", "measure_every", "held_out", "width", "depth")}
        rates = {"draft_steps": self.draft_steps, "online_lr": self.online_lr, "restyle_lr": self.restyle_lr}
        check_positive("draft_drift", **sizes, **rates, threads=self.threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement.

    Attributes:
        update: Policy updates so far.
        reward: Mean reward of the last update's trajectories; None before the first.
        mean_tokens: Length of the held-out answers.
        followed, frozen: Tokens a step with the draft that was updated, and with the one that was not.
    """

    update: int
    reward: float | None
    mean_tokens: float
    followed: float
    frozen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How acceptance went under one policy.

    Attributes:
        policy: Its name.
        updated_ratio, frozen_ratio: Tokens a step at the end as a share of those at the start, with either draft.
        points: The measurements; one comes before the first update.
        duration_s: Wall clock.
    """

    policy: str
    updated_ratio: float
    frozen_ratio: float
    points: tuple[Point, ...]
    duration_s: float


def run(config: RunConfig, options: Options, name: str, console: Console) -> Drift:
    """Learn and measure under one policy."""
    began = time.monotonic()
    if name == "restyle":
        config = replace(config, trainer=replace(config.trainer, lr=options.restyle_lr))
    target = load_target(config.model)
    folder = Path(options.draft) if options.draft is not None else Path(config.model.path) / "draft"
    shape, tensors = load_draft(folder)
    target.check(shape)
    frozen = CloverDraft(shape)
    frozen.load(tensors)
    followed = copy.deepcopy(frozen)
    temperature = config.sampling.temperature
    trainer = DraftTrainer(followed, DraftTrainingConfig(online_lr=options.online_lr, temperature=temperature))
    workload = Workload(config.workload, config.model, config.trainer.seed)
    policy, order = POLICIES[name](target, config), torch.Generator().manual_seed(config.trainer.seed)
    held_out = workload.held_out()[: options.held_out]
    reward, points = None, list[Point]()
    for update in range(options.updates + 1):
        if update:
            width = config.trainer.prompts_per_step
            reward, samples = policy.update(workload.batch((update - 1) * width, width))
            taught = [s for s in samples if len(s.token_ids) > s.num_prompt_tokens + 1]
            trainer.update(taught, target=target.layers, num_steps=options.draft_steps, generator=order, version=update)
        if update % options.measure_every == 0 or update == options.updates:
            point = _measure(target, frozen, followed, held_out, config, options, update, reward)
            console.print(f"{name} {update}: {point.followed:.2f} tokens a step updated, {point.frozen:.2f} frozen")
            points.append(point)
    return Drift(
        policy=name,
        updated_ratio=points[-1].followed / points[0].followed,
        frozen_ratio=points[-1].frozen / points[0].frozen,
        points=tuple(points),
        duration_s=time.monotonic() - began,
    )


def _measure(
    target: Target,
    frozen: CloverDraft,
    followed: CloverDraft,
    prompts: Sequence[Prompt],
    config: RunConfig,
    options: Options,
    update: int,
    reward: float | None,
) -> Point:
    samples = rollouts(
        target.model,
        prompts,
        run_seed=config.trainer.seed,
        eos_token_id=target.eos_token_id,
        max_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        say=lambda _: None,
    )
    kept = [s for s in samples if len(s.token_ids) > s.num_prompt_tokens + 1]
    shape = TreeShape(max_width=options.width, depth=options.depth, budget=options.width * options.depth)
    followed_steps, frozen_steps = (
        simulate_draft(draft, kept, [shape], target=target.layers, temperature=config.sampling.temperature)[0]
        for draft in (followed, frozen)
    )
    num_tokens = sum(len(s.token_ids) - s.num_prompt_tokens for s in samples)
    return Point(
        update=update,
        reward=reward,
        mean_tokens=num_tokens / len(samples),
        followed=followed_steps.tokens_per_step,
        frozen=frozen_steps.tokens_per_step,
    )


def table(drift: Drift) -> Table:
    """One line for each measurement, with shares of the first."""
    title = f"{drift.policy}: tokens a step on held-out prompts, by policy updates"
    result = Table(title=title, title_justify="left")
    for heading in (
        "update",
        "reward",
        "answer tokens",
        "draft updated",
        "of its start",
        "draft frozen",
        "of its start",
    ):
        result.add_column(heading, justify="right")
    first = drift.points[0]
    for point in drift.points:
        result.add_row(
            str(point.update),
            "" if point.reward is None else f"{point.reward:.2f}",
            f"{point.mean_tokens:.0f}",
            f"{point.followed:.2f}",
            f"{point.followed / first.followed:.0%}",
            f"{point.frozen:.2f}",
            f"{point.frozen / first.frozen:.0%}",
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.WARNING)
    try:
        options, overrides = split_arguments(Options, arguments)
        if not any(override.startswith("experiment=") for override in overrides):
            overrides = ["experiment=tiny_grpo", "sampling.n_samples_per_prompt=4", *overrides]
        config = compose(overrides)
        config.model.path = model_directory(config.model.path)
        console = Console(width=120)
        torch.set_num_threads(options.threads)
        drifts = [run(config, options, name, console) for name in options.policies]
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    for drift in drifts:
        console.print(table(drift))
    if options.out is not None:
        record = {"options": asdict(options), "policies": [asdict(drift) for drift in drifts]}
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
