"""Engines' schedulers that count what they sample for rollouts. Loaded in engine processes by launch.chaos only.

Tokens of held-out problems are left out: they are not durable, and nobody kills while they are generated. A step that
was sampled and died with the engine's core before it was counted is missing: one token of each running request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.vllm_plugin.scheduler import VersionedAsyncScheduler, VersionedScheduler
from launch.token_counts import TokenCount

FOLDER_KEY = "longroll_token_counts"  # of vLLM's additional_config
EVALUATION = ":eval/"  # in request ids, which hold "<handle>:<group id>"


class CountingMixin:
    """Mix in before a scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        folder = self.vllm_config.additional_config[FOLDER_KEY]  # type: ignore[attr-defined]
        self._count = TokenCount(Path(folder))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        every = (one for client in outputs.values() for one in client.outputs)
        self._count.add(sum(len(one.new_token_ids) for one in every if EVALUATION not in one.request_id))
        return outputs


class CountingScheduler(CountingMixin, VersionedScheduler):
    """For engines without asynchronous scheduling (CPU)."""


class CountingAsyncScheduler(CountingMixin, VersionedAsyncScheduler):
    """For engines with asynchronous scheduling (CUDA)."""
