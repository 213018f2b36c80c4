"""Distils a draft model from its target's trajectories: once from many, and online from fresh ones.

Owns the optimiser and the names under which a draft travels beside its target's
weights. Knows nothing of how trajectories come about, of ranks or of transports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
        warmup_steps: Steps of the rise.
        online_lr: Step size of online updates, constant.
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
    online_lr: float = 3e-4
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
    """One step: its loss, the gradient's norm before clipping, and the agreement at each depth."""

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
    ) -> dict[str, torch.Tensor]:
        """Follow the target to its new version.

        Args:
            samples: Fresh trajectories with hidden states of the new version, or of the one that sampled them.
            target: The layers of the new version shared with the draft, in float32.
            num_steps: Optimiser steps, 0 for none.
            generator: Of the order.
            version: The new version; the draft's configuration carries it from now on.

        Returns:
            Copies of the draft's tensors by the names they travel under, to be published with this version.

        Raises:
            InvalidRequest: Steps are wanted without samples.
        """
        if num_steps and not samples:
            raise InvalidRequest("fresh samples for a draft update", 0, f"at least 1 for {num_steps} steps")
        batches = drawn_batches(samples, self._config.batch_tokens, generator)
        for _ in range(num_steps):
            self._step(next(batches), target, self._config.online_lr, generator)
        self.draft.config = self.draft.config.at_version(version)
        return travelling_tensors(self.draft)

    def _step(
        self,
        samples: Sequence[DraftSample],
        target: TargetLayers,
        lr: float,
        generator: torch.Generator,
    ) -> StepResult:
        config = self._config
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
        return StepResult(loss=float(result.loss.detach()), grad_norm=norm, agreement=result.agreement)


def travelling_tensors(draft: CloverDraft) -> dict[str, torch.Tensor]:
    """Copies of a draft's tensors by the names they travel under."""
    return {TENSOR_PREFIX + name: tensor.detach().clone() for name, tensor in draft.state_dict().items()}


def take_travelling(draft: CloverDraft, tensors: Mapping[str, torch.Tensor], version: int) -> None:
    """Put travelled tensors into a draft; names without the prefix are the target's and are passed over.

    Raises:
        InvalidRequest: A tensor of the draft is missing, left over or of another shape.
    """
    own = {name.removeprefix(TENSOR_PREFIX): t for name, t in tensors.items() if name.startswith(TENSOR_PREFIX)}
    draft.load(own)
    draft.config = draft.config.at_version(version)
