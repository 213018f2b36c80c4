"""Train a Clover-2 draft from its target's own rollouts.

    python -m launch.train_draft [model.path=…] [draft=DIR] [prompts=2048] [steps=1600] [out=PATH]

Samples training prompts of the workload with the target (or takes a run's export: export=PATH), distils, and measures
acceptance on held-out prompts: exactly, because with keyed sampling a trajectory is what speculation would have written
whatever was drafted. Writes the draft's directory, and with out= a record. Fixed seeds make a run repeatable on one
kind of machine.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launch.arguments import split_arguments
from launch.compose import compose, model_directory
from launch.draft_report import measure, record, table
from launch.draft_rollouts import exported_rollouts, rollouts
from launch.draft_target import Target, load_target
from launch.workload import Workload
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError, check_positive
from rollout.speculation.clover import CloverDraft
from rollout.speculation.clover_config import DraftConfig, load_draft, save_draft
from rollout.speculation.clover_samples import DraftSample
from rollout.speculation.clover_training import DraftTrainer, DraftTrainingConfig, StepResult
from rollout.speculation.tree import MAX_WIDTH

CUTS = (12, 8)  # budgets of a tree that the report shows beside the whole tree
DRAFT_DTYPE = torch.bfloat16  # of the file; it is computed with in the dtype of the target's activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Beside overrides of the configuration, of which model, sampling and workload count.

    Attributes:
        draft: Directory to write; None = the model's own, /draft.
        export: Export of a run to learn from; None = sample training prompts.
        prompts: Training prompts to sample, or trajectories of the export at most.
        steps: Optimiser steps.
        lr: Highest step size.
        layers: Transformer layers of the augmenting block.
        depth: Depths trained, and depth of the trees measured.
        width: Of the trees measured.
        seed: Of sampling, of the draft's first weights and of the order of training.
        version: Weight version of the target, written into the draft.
        threads: CPU threads.
        out: JSON file for the measurements.
    """

    draft: str | None = None
    export: str | None = None
    prompts: int = 2048
    steps: int = 1600
    lr: float = 3e-3
    layers: int = 2
    depth: int = 5
    width: int = MAX_WIDTH
    seed: int = 0
    version: int = 0
    threads: int = 1
    out: str | None = None

    def __post_init__(self) -> None:
        check_positive("train_draft", prompts=self.prompts, steps=self.steps, lr=self.lr, layers=self.layers)
        check_positive("train_draft", depth=self.depth, threads=self.threads)
        if not 1 <= self.width <= MAX_WIDTH:
            raise InvalidRequest("width", self.width, f"1 to {MAX_WIDTH}")


def sample(target: Target, config: RunConfig, options: Options, progress: Progress) -> list[list[DraftSample]]:
    """Trajectories to learn from, and held-out ones."""
    workload = Workload(config.workload, config.model, options.seed)
    wanted = [workload.batch(0, options.prompts) if options.export is None else [], workload.held_out()]
    samples = []
    for title, prompts in zip(("training rollouts", "held-out rollouts"), wanted, strict=True):
        if not prompts:
            assert options.export is not None
            samples.append(exported_rollouts(target.model, Path(options.export), options.prompts))
            continue
        bar = progress.add_task(title, total=len(prompts), figures="")
        done = rollouts(
            target.model,
            prompts,
            run_seed=options.seed,
            eos_token_id=target.eos_token_id,
            max_tokens=config.sampling.max_tokens,
            temperature=config.sampling.temperature,
            say=lambda number, bar=bar: progress.update(bar, completed=number),  # type: ignore[misc]
        )
        samples.append([one for one in done if len(one.token_ids) > one.num_prompt_tokens + 1])
    return samples


def train(
    target: Target, samples: Sequence[DraftSample], config: DraftTrainingConfig, options: Options, progress: Progress
) -> CloverDraft:
    """A new draft, distilled from samples."""
    torch.manual_seed(options.seed)
    shape = DraftConfig.for_target(
        target.settings,
        target.vocabulary,
        target_version=options.version,
        num_layers=options.layers,
        num_steps=options.depth,
    )
    draft = CloverDraft(shape).to(next(target.model.parameters()).device)
    bar = progress.add_task("distilling", total=options.steps, figures="")

    def say(step: int, result: StepResult) -> None:
        agreement = " ".join(f"{share:.0%}" for share in result.agreement)
        progress.update(
            bar, completed=step + 1, figures=f"loss {result.loss:.2f}, likeliest token the same {agreement}"
        )

    DraftTrainer(draft, config).fit(
        samples,
        target=target.layers,
        num_steps=options.steps,
        generator=torch.Generator().manual_seed(options.seed),
        say=say,
    )
    return draft.eval()


def run(config: RunConfig, options: Options, console: Console) -> dict[str, Any]:
    """Sample, train, save and measure; returns the record."""
    torch.set_num_threads(options.threads)
    temperature = config.sampling.temperature
    if temperature <= 0:
        raise InvalidRequest("sampling.temperature", temperature, "a number > 0: a distribution is distilled")
    target = load_target(config.model)
    training = DraftTrainingConfig(lr=options.lr, temperature=temperature)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    started = time.monotonic()
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as progress:
        samples, held_out = sample(target, config, options, progress)
        sampled = time.monotonic()
        draft = train(target, samples, training, options, progress)
    trained = time.monotonic()
    folder = Path(options.draft) if options.draft is not None else Path(config.model.path) / "draft"
    save_draft(folder, draft.config, {name: tensor.to(DRAFT_DTYPE) for name, tensor in draft.state_dict().items()})
    draft.load(load_draft(folder)[1])  # what is measured is what was written
    lines = measure(
        draft,
        target.layers,
        held_out,
        temperature=temperature,
        width=options.width,
        depth=options.depth,
        budgets=[cut for cut in CUTS if cut < options.width * options.depth],
    )
    console.print(
        table(lines, f"{len(held_out)} held-out prompts at temperature {temperature:g}, depth {options.depth}")
    )
    console.print(f"wrote {folder}: {sum(p.numel() for p in draft.parameters()):,} parameters")
    return {
        "acceptance": record(lines),
        "options": asdict(options),
        "training": asdict(training),
        "draft": asdict(draft.config),
        "num_training_samples": len(samples),
        "num_training_tokens": sum(len(s.token_ids) - s.num_prompt_tokens for s in samples),
        "num_held_out": len(held_out),
        "sampling_s": sampled - started,
        "training_s": trained - sampled,
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.WARNING)
    try:
        options, overrides = split_arguments(Options, arguments)
        config = compose(overrides)
        config.model.path = model_directory(config.model.path)
        result = run(config, options, Console(width=140))
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if options.out is not None:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
