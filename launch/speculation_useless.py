"""Drafts that are worth nothing and cost as much as good ones: a draft model with its numbers shuffled.

For benchmarks of how soon speculation is turned off. A worker makes the drafter by name, as any of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from actors.vllm_plugin.clover_drafter import CloverDrafter
from rollout.errors import LongrollError
from rollout.speculation.clover_config import load_draft
from rollout.speculation.clover_training import TENSOR_PREFIX
from rollout.speculation_config import SpeculationConfig
from rollout.sync.checkpoint_names import checkpoint_files
from rollout.sync.encoding import TensorPlan
from rollout.sync.manifest import torch_dtype

USELESS = "launch.speculation_useless:UselessDrafter"
"""As a source of drafts."""


def shuffled(tensors: Mapping[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Each tensor with its own numbers at random places: of the same size, scale and cost, but without what it knew."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)
        for name, tensor in tensors.items()
    }


class UselessDrafter(CloverDrafter):
    """The configured draft model, shuffled. Arguments as those of `CloverDrafter`."""

    def __init__(self, config: SpeculationConfig, vllm_config: Any, model: Any) -> None:
        super().__init__(config, vllm_config, model)
        self.draft.load(shuffled(self.draft.state_dict()))


def publication(
    plans: Mapping[str, TensorPlan], model_dir: str, draft_dir: str, *, is_corrupted: bool
) -> dict[str, torch.Tensor]:
    """The model directory's own weights, to be published once more, and the draft's, as they are or shuffled.

    Args:
        plans: Of the service, by the names that tensors travel under.
        model_dir, draft_dir: Where they are read from.
        is_corrupted: The draft is shuffled.

    Raises:
        LongrollError: The service expects a tensor that neither has, or no draft.
    """
    _, draft = load_draft(draft_dir)
    travelling = {TENSOR_PREFIX + name: t for name, t in (shuffled(draft) if is_corrupted else draft).items()}
    tensors = travelling | {
        name: tensor
        for path in sorted(set(checkpoint_files(Path(model_dir)).values()))
        for name, tensor in load_file(path).items()
    }
    missing = sorted(plans.keys() - tensors.keys()) + sorted(travelling.keys() - plans.keys())
    if missing:
        raise LongrollError(f"publication: got {missing[:3]} on one side only, expected model and draft on both")
    return {name: tensors[name].to(torch_dtype(plan.dtype)) for name, plan in plans.items()}
