"""Plain vLLM as a synchronous trainer uses it: `LLM.generate` on engines that share nothing. For benchmarks.

Each engine is an actor with vLLM's own model, scheduler and sampler. Knows nothing of Longroll's service; what it is
given are prompts and the number of tokens after which each generation ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.engine_args import DEFAULT_CPU_KV_BYTES
from rollout.config import EngineConfig, ModelConfig

START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One generation: `num_tokens` tokens, whatever they are."""

    prompt: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """When its first and last token came, in seconds since the call, and how many prompt tokens were cached."""

    first_s: float
    last_s: float
    num_tokens: int
    num_cached_tokens: int


class StockEngine:
    """Hosts one `vllm.LLM`; speculative options are vLLM's own.

    Args:
        core: CPU core it computes on.
        model, engine: The same as the service's.
        extra: Further arguments of `vllm.LLM`, verbatim.
    """

    def __init__(self, core: int, model: ModelConfig, engine: EngineConfig, extra: dict[str, Any]) -> None:
        os.environ.update(
            VLLM_CPU_OMP_THREADS_BIND=str(core),
            VLLM_USE_V2_MODEL_RUNNER="0",
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL="WARNING",
        )
        from vllm import LLM

        sizes = {} if engine.block_size is None else {"block_size": engine.block_size}
        self._llm = LLM(
            model.path,
            dtype=engine.dtype or model.dtype,
            max_model_len=model.max_model_len,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            kv_cache_memory_bytes=engine.kv_cache_bytes or DEFAULT_CPU_KV_BYTES,
            enable_prefix_caching=engine.enable_prefix_caching,
            disable_log_stats=False,  # or outputs come without times
            **sizes,
            **extra,
        )

    def ready(self) -> None:
        """Returns once the engine serves."""

    def clear(self) -> None:
        """Empty the prefix cache."""
        self._llm.reset_prefix_cache()

    def num_tokens(self) -> tuple[int, int]:
        """Generated since the start, and how many of them were drafts that vLLM's own speculation had accepted."""
        counts = {metric.name: getattr(metric, "value", 0) for metric in self._llm.get_metrics()}
        return counts["vllm:generation_tokens"], counts.get("vllm:spec_decode_num_accepted_tokens", 0)

    def generate(self, asked: Sequence[Asked]) -> list[Answered]:
        """Everything at once, in one call of `LLM.generate`."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                max_tokens=one.num_tokens,
                temperature=1.0,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,  # as a trainer needs it, of the token that was drawn
            )
            for one in asked
        ]
        began = time.monotonic()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(one.prompt)} for one in asked], sampling, use_tqdm=False
        )
        return [_answered(output, began) for output in outputs]


def _answered(output: Any, began: float) -> Answered:
    metrics = output.metrics
    return Answered(
        first_s=metrics.first_token_ts - began,
        last_s=metrics.last_token_ts - began,
        num_tokens=len(output.outputs[0].token_ids),
        num_cached_tokens=output.num_cached_tokens or 0,
    )


def start_stock_engines(number: int, model: ModelConfig, engine: EngineConfig, extra: dict[str, Any]) -> list[Any]:
    """Actors, each on a core of its own, that are ready."""
    cores = sorted(os.sched_getaffinity(0))
    actors = [
        ray.remote(StockEngine).options(num_cpus=0).remote(cores[i % len(cores)], model, engine, extra)
        for i in range(number)
    ]
    ray.get([actor.ready.remote() for actor in actors], timeout=START_TIMEOUT_S)
    return actors
