"""vLLM's scheduler, told by each step's output under which weight version it ran.

Owns what happens to KV when the version changes between two steps:

- `recompute_kv`: every running request is preempted and prefills again under the new weights. What the
  step of the change sampled, with new weights over old KV, is dropped, so each token of a trajectory is
  a function of one version's weights;
- otherwise running requests go on with the KV they have, and their blocks get hashes of their own.

Either way the prefix cache is emptied: no request finds KV of another version than its own.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.request import RequestStatus

from actors.vllm_plugin.drafting import DRAFTS_ATTRIBUTE
from actors.vllm_plugin.options import PluginOptions
from actors.vllm_plugin.versioned import VERSION_ATTRIBUTE

if TYPE_CHECKING:
    from vllm.v1.request import Request


class VersionMixin:
    """Mix in before a vLLM V1 scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = PluginOptions.of(self.vllm_config)  # type: ignore[attr-defined]
        self.weight_version: int = options.initial_version
        self._recompute_kv = options.recompute_kv
        self._speculation = options.speculation

    def add_request(self, request: Request) -> None:
        super().add_request(request)  # type: ignore[misc]
        if self._speculation is not None:
            # As vLLM does for the drafts that it makes itself: counts that come with the request's last output.
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self._speculation.max_depth)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        version = getattr(model_runner_output, VERSION_ATTRIBUTE, None)
        if version is not None and version != self.weight_version:
            self.weight_version = version
            self._on_new_version()
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        drafts = getattr(model_runner_output, DRAFTS_ATTRIBUTE, None)
        if drafts:
            self._take_drafts(drafts)
        return outputs

    def _take_drafts(self, drafts: dict[str, list[int]]) -> None:
        """Let the next step verify draft tokens of requests that go on; see tree_runner.py."""
        for request_id, tokens in drafts.items():
            request = self.requests.get(request_id)  # type: ignore[attr-defined]
            if request is not None and request.status == RequestStatus.RUNNING:
                request.spec_token_ids = tokens

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's counts are of chains of one length; trees are counted where they are drafted."""

    def _on_new_version(self) -> None:
        if self._recompute_kv:
            self.reset_prefix_cache(reset_running_requests=True)  # type: ignore[attr-defined]
            return
        now = time.monotonic()
        kept = []
        for request in self.running:  # type: ignore[has-type]
            if request.num_output_tokens == 0:  # it may have begun on cached KV of the old version
                self._preempt_request(request, now, drop_stale_output=True)  # type: ignore[attr-defined]
            else:
                kept.append(request)
        self.running = kept
        self.prev_step_scheduled_req_ids.clear()  # type: ignore[attr-defined]
        pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]
        # Those that have a hash, often few: offering all 3,640 blocks of a pool took 2.1 ms, finding these 0.5.
        others = pool.cached_block_hashes_by_block
        pool.evict_blocks({b.block_id for b in pool.blocks if b.block_hash is not None or b.block_id in others})
        for request in kept:
            self._give_own_hashes(request)

    def _give_own_hashes(self, request: Request) -> None:
        """Blocks of this request hold KV of several versions: nobody else may find them."""
        if request._block_hasher is None:  # no prefix caching
            return
        request.cache_salt = f"{request.request_id}@{self.weight_version}"
        request.block_hashes.clear()
        request.update_block_hashes()


class VersionedScheduler(VersionMixin, Scheduler):
    """For engines without asynchronous scheduling (CPU)."""


class VersionedAsyncScheduler(VersionMixin, AsyncScheduler):
    """For engines with asynchronous scheduling (CUDA)."""
