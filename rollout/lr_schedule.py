"""The learning rate as a pure function of the step: linear warm-up, then constant."""

from __future__ import annotations


def lr_at(step: int, lr: float, num_warmup_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0; the first step is never 0."""
    if step >= num_warmup_steps:
        return lr
    return lr * (step + 1) / num_warmup_steps
