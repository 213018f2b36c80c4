"""Keeps the newest scheduler statistics of a vLLM engine for `Shard.stats`."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats


class LastStats:
    """Holder that outlives the logger objects vLLM builds from `factory`."""

    def __init__(self) -> None:
        self.last = SchedulerStats()
        self.num_preemptions = 0
        self.num_steps = 0
        self.num_tokens = 0  # sampled
        self.num_later_tokens, self.later_s = 0, 0.0  # after the first of their request, and since the token before
        self.kv_usage_max = 0.0  # since the weights last changed

    def factory(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        """A vLLM stat-logger factory."""
        return _Recorder(self)


class _Recorder(StatLoggerBase):
    def __init__(self, target: LastStats) -> None:
        self._target = target

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        self._target.num_steps += 1
        if scheduler_stats is not None:
            self._target.last = scheduler_stats
            self._target.kv_usage_max = max(self._target.kv_usage_max, scheduler_stats.kv_cache_usage)
        if iteration_stats is not None:
            self._target.num_preemptions += iteration_stats.num_preempted_reqs
            self._target.num_tokens += iteration_stats.num_generation_tokens
            num_first = len(iteration_stats.time_to_first_tokens_iter)
            self._target.num_later_tokens += iteration_stats.num_generation_tokens - num_first
            self._target.later_s += sum(iteration_stats.inter_token_latencies_iter)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
