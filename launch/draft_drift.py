"""Does a draft keep up with a policy that learns?

    python -m launch.draft_drift [draft=DIR] [updates=20] [measure_every=5] [draft_steps=8] [out=PATH]

Takes GRPO updates on the target in one process (the trainer's loss on the workload's prompts), and after each gives one
copy of the draft a few distillation steps on the update's own trajectories and hidden states, as the trainer does; the
other copy stays as it was. Both are measured on held-out prompts that the target of the moment answers anew.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from launch.arguments import split_arguments
from launch.compose import compose, model_directory
from launch.draft_rollouts import rollouts, sample_tokens
from launch.draft_target import Target, load_target
from launch.workload import Workload
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError, check_positive
from rollout.loss import group_advantages, policy_loss, selected_logprobs, token_weights
from rollout.rewards import resolve_reward, score_completion
from rollout.seeds import trajectory_seed
from rollout.speculation.clover import CloverDraft
from rollout.speculation.clover_config import load_draft
from rollout.speculation.clover_samples import DraftSample
from rollout.speculation.clover_simulation import TreeShape, simulate_draft
from rollout.speculation.clover_training import DraftTrainer, DraftTrainingConfig
from rollout.speculation.tree import MAX_WIDTH
from rollout.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Beside overrides of the configuration, of which model, sampling, trainer and workload count.

    Attributes:
        draft: Directory of the draft; None = the model's own, /draft.
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
    updates: int = 20
    measure_every: int = 5
    draft_steps: int = 8
    online_lr: float = 3e-4
    held_out: int = 128
    width: int = MAX_WIDTH
    depth: int = 5
    threads: int = 1
    out: str | None = None

    def __post_init__(self) -> None:
        names = ("updates", "measure_every", "draft_steps", "online_lr", "held_out", "width", "depth", "threads")
        check_positive("draft_drift", **{name: getattr(self, name) for name in names})


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


class Policy:
    """Owns the target while it learns: one process, on-policy, plain GRPO."""

    def __init__(self, target: Target, config: RunConfig) -> None:
        reward = resolve_reward(config.workload.reward)
        if reward is None:
            raise InvalidRequest("workload.reward", config.workload.reward, "a reward to learn from")
        self._target, self._config, self._reward = target, config, reward
        self._tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        trainer = config.trainer
        self._optimizer = torch.optim.AdamW(
            target.model.parameters(), lr=trainer.lr, betas=trainer.betas, weight_decay=trainer.weight_decay
        )

    def update(self, prompts: Sequence[Prompt]) -> tuple[float, list[DraftSample]]:
        """One optimizer step on n samples of each prompt; returns the mean reward and what the draft can learn from.

        The hidden states are those of the step's own forward: one update older than the weights it leads to.
        """
        sampling, n = self._config.sampling, self._config.sampling.n_samples_per_prompt
        asked = [(prompt, i) for prompt in prompts for i in range(n)]
        seeds = [trajectory_seed(self._config.trainer.seed, p.prompt_id, i) for p, i in asked]
        outputs = sample_tokens(
            self._target.model,
            [p.token_ids for p, _ in asked],
            seeds,
            eos_token_id=self._target.eos_token_id,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
        )
        rewards = [self._score(p, tokens) for (p, _), tokens in zip(asked, outputs, strict=True)]
        advantages = [
            advantage
            for start in range(0, len(asked), n)
            for advantage in group_advantages(
                rewards[start : start + n], normalise_std=self._config.trainer.normalise_std
            )
        ]
        samples = self._step([p.token_ids for p, _ in asked], outputs, advantages, seeds)
        return sum(rewards) / len(rewards), [s for s in samples if len(s.token_ids) > s.num_prompt_tokens + 1]

    def _score(self, prompt: Prompt, tokens: list[int]) -> float:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return score_completion(self._reward, prompt, tuple(tokens), text).reward

    def _step(
        self,
        prompts: Sequence[tuple[int, ...]],
        outputs: Sequence[list[int]],
        advantages: Sequence[float],
        seeds: Sequence[int],
    ) -> list[DraftSample]:
        trainer, model = self._config.trainer, self._target.model
        weights = token_weights([len(o) for o in outputs], trainer.loss_aggregation, self._config.sampling.max_tokens)
        order = sorted(range(len(outputs)), key=lambda i: len(prompts[i]) + len(outputs[i]))
        samples: list[DraftSample] = []
        while order:
            longest = len(prompts[order[-1]]) + len(outputs[order[-1]])
            some = [order.pop() for _ in range(max(1, min(len(order), trainer.micro_batch_tokens // longest)))]
            ids = torch.zeros(len(some), longest, dtype=torch.long)
            token_weight = torch.zeros(len(some), longest - 1)
            for row, i in enumerate(some):
                start, stop = len(prompts[i]), len(prompts[i]) + len(outputs[i])
                ids[row, :stop] = torch.tensor([*prompts[i], *outputs[i]])
                token_weight[row, start - 1 : stop - 1] = weights[i]
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[:, :-1])
            logprobs = selected_logprobs(logits, ids[:, 1:], self._config.sampling.temperature)
            policy_loss(
                logprobs,
                logprobs,
                torch.tensor([[advantages[i]] for i in some]),
                token_weight,
                clip_low=trainer.clip_low,
                clip_high=trainer.clip_high,
            ).loss.backward()
            for row, i in enumerate(some):
                stop = len(prompts[i]) + len(outputs[i])
                samples.append(
                    DraftSample(
                        token_ids=ids[row, :stop],
                        num_prompt_tokens=len(prompts[i]),
                        hidden=hidden[row, :stop].detach(),
                        seed=seeds[i],
                    )
                )
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return samples


def run(config: RunConfig, options: Options, console: Console) -> list[Point]:
    """Learn and measure."""
    torch.set_num_threads(options.threads)
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
    policy, order = Policy(target, config), torch.Generator().manual_seed(config.trainer.seed)
    held_out = workload.held_out()[: options.held_out]
    reward, points = None, []
    for update in range(options.updates + 1):
        if update:
            width = config.trainer.prompts_per_step
            reward, samples = policy.update(workload.batch((update - 1) * width, width))
            trainer.update(
                samples, target=target.layers, num_steps=options.draft_steps, generator=order, version=update
            )
        if update % options.measure_every == 0 or update == options.updates:
            point = _measure(target, frozen, followed, held_out, config, options, update, reward)
            console.print(f"update {update}: {point.followed:.2f} tokens a step updated, {point.frozen:.2f} frozen")
            points.append(point)
    return points


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


def table(points: Sequence[Point]) -> Table:
    """One line for each measurement, with shares of the first."""
    result = Table(title="tokens a step on held-out prompts, by policy updates", title_justify="left")
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
    first = points[0]
    for point in points:
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


def record(options: Options, points: Sequence[Point]) -> dict[str, Any]:
    """What is written as JSON."""
    first, last = points[0], points[-1]
    return {
        "followed_share": last.followed / first.followed,
        "frozen_share": last.frozen / first.frozen,
        "options": asdict(options),
        "points": [asdict(point) for point in points],
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.WARNING)
    try:
        options, overrides = split_arguments(Options, arguments)
        if not any(override.startswith("experiment=") for override in overrides):
            overrides = ["experiment=tiny_grpo", *overrides]
        config = compose(overrides)
        config.model.path = model_directory(config.model.path)
        console = Console(width=120)
        points = run(config, options, console)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    console.print(table(points))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record(options, points), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
