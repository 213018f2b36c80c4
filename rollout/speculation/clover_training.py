"""Distils a draft model from its target's trajectories: once from many, and online from fresh ones.

Owns the optimiser, and the prefix of the names under which a draft travels beside its target's weights. Knows nothing
of how trajectories come about, of ranks or of transports.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rollout.errors import InvalidRequest, LongrollError, check_positive
from rollout.speculation.clover import CloverDraft, TargetLayers
from rollout.speculation.clover_loss import LossWeights, distillation_loss, draw_roots
from rollout.speculation.clover_samples import DraftSample, collate, drawn_batches

TENSOR_PREFIX = "draft."
"""Before a draft's own tensor names where they travel with those of its target."""

Average = Callable[[list[torch.Tensor]], None]
"""Averages gradients in place over the ranks that train one draft together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTrainingConfig:
    """How a draft learns.

    Attributes:
        lr: Highest step size of offline training; it rises linearly and falls to zero along a cosine.
        warmup_steps: Steps of the rise, offline and online.
        online_lr: Step size of online updates, constant after as many steps of rise.
        weight_decay: Of matrices.
        betas: Of Adam.
        max_grad_norm: Gradients are scaled down to this norm.
        batch_tokens: Tokens of a step at most, prompts and padding included.
        max_roots: Roots of a batch that are drafted from, drawn at random: the block runs over all tokens anyway, but
            a root costs as many regressive steps as there are depths.
        loss: How the parts of the loss are mixed.
        temperature: Of sampling: the distribution that is distilled is the one drawn from.
    """

    lr: float = 3e-3
    warmup_steps: int = 50
    online_lr: float = 5e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    batch_tokens: int = 2048
    max_roots: int = 256
    loss: LossWeights = field(default_factory=LossWeights)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(
            "draft training",
            lr=self.lr,
            online_lr=self.online_lr,
            max_grad_norm=self.max_grad_norm,
            batch_tokens=self.batch_tokens,
            max_roots=self.max_roots,
            temperature=self.temperature,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One step: its loss, the gradient's norm before clipping, and the agreement at each depth.

    On a rank without samples the loss is 0 and there is no agreement.
    """

    loss: float
    grad_norm: float
    agreement: tuple[float, ...]


class DraftTrainer:
    """Owns a draft's optimiser state; the draft itself is trained in place.

    Args:
        draft: In float32.
        config: How.
        average: Called with all gradients before each step, where several ranks train one draft.
    """

    def __init__(self, draft: CloverDraft, config: DraftTrainingConfig, average: Average | None = None) -> None:
        self.draft, self._config, self._average = draft, config, average
        matrices = [p for p in draft.parameters() if p.ndim > 1]
        vectors = [p for p in draft.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._num_online = 0
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, foreach=True)

    def fit(
        self,
        samples: Sequence[DraftSample],
        *,
        target: TargetLayers,
        num_steps: int,
        generator: torch.Generator,
        say: Callable[[int, StepResult], None],
    ) -> None:
        """Train on samples, passing over them as often as needed.

        Args:
            samples: Of one version of the target.
            target: Its layers shared with the draft, in float32.
            num_steps: Optimiser steps.
            generator: Of the order.
            say: Told each step's number, from 0, and its result.
        """
        batches = drawn_batches(samples, self._config.batch_tokens, generator)
        for step in range(num_steps):
            rise = min(1.0, (step + 1) / max(self._config.warmup_steps, 1))
            fall = 0.5 * (1 + math.cos(math.pi * step / num_steps))
            say(step, self._step(next(batches), target, self._config.lr * min(rise, fall), generator))

    def update(
        self,
        samples: Sequence[DraftSample],
        *,
        target: TargetLayers,
        num_steps: int,
        generator: torch.Generator,
        version: int,
    ) -> list[StepResult]:
        """Follow the target to its new version.

        Args:
            samples: Fresh trajectories with hidden states of the new version, or of the one that sampled them. Of
                several ranks that train one draft, some may have none.
            target: The layers of the new version shared with the draft, in float32.
            num_steps: Optimiser steps, 0 for none; the same on every rank.
            generator: Of the order.
            version: The new version; the draft's configuration carries it from now on.

        Returns:
            What each step came to, here.

        Raises:
            InvalidRequest: Steps are wanted without samples.
            LongrollError: A gradient is not finite; the steps before it were taken.
        """
        if num_steps and not samples and self._average is None:
            raise InvalidRequest("fresh samples for a draft update", 0, f"at least 1 for {num_steps} steps")
        batches = drawn_batches(samples, self._config.batch_tokens, generator) if samples else itertools.repeat([])
        results = []
        for _ in range(num_steps):
            self._num_online += 1  # Adam's first steps, when it knows no scales yet, would undo what was learnt
            rise = min(1.0, self._num_online / max(self._config.warmup_steps, 1))
            results.append(self._step(next(batches), target, self._config.online_lr * rise, generator))
        self.draft.config = self.draft.config.at_version(version)
        return results

    def state(self) -> dict[str, Any]:
        """The optimiser's state, for `restore`."""
        return {"num_online": self._num_online, "optimizer": self._optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state` gave. Raises ValueError or KeyError where it is another optimiser's."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._num_online = state["num_online"]

    def _step(
        self,
        samples: Sequence[DraftSample],
        target: TargetLayers,
        lr: float,
        generator: torch.Generator,
    ) -> StepResult:
        config = self._config
        loss, agreement = 0.0, tuple[float, ...]()
        if samples:
            batch = collate(samples, next(self.draft.parameters()).device)
            result = distillation_loss(
                self.draft,
                batch,
                draw_roots(batch, config.max_roots, generator),
                target=target,
                weights=config.loss,
                temperature=config.temperature,
            )
            if result.loss.requires_grad:
                result.loss.backward()
            loss, agreement = float(result.loss.detach()), result.agreement
        gradients = []
        for parameter in self.draft.parameters():
            if parameter.grad is None:  # a batch of outputs too short for this part
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self._average is not None:
            self._average(gradients)
        norm = float(torch.nn.utils.clip_grad_norm_(self.draft.parameters(), config.max_grad_norm))
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise LongrollError(f"draft model: gradient norm {norm}, expected a finite one; no step was taken")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss, grad_norm=norm, agreement=agreement)
