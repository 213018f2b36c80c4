"""A shard: one data-parallel rank of an expert-parallel group, as one vLLM engine in one Ray actor.

Owns the engine process group of its rank and nothing else. It knows nothing of queues, groups,
rewards or trainers; it runs chunks, and takes part in publications as the controller tells it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from actors.engine_args import engine_args
from actors.ports import free_port
from actors.vllm_plugin import SEED_KEY
from rollout.config import EngineConfig, InFlight, ModelConfig, SyncConfig
from rollout.errors import EngineDead, LongrollError, SyncRefused
from rollout.fleet import Rendezvous, ShardInfo, ShardStats
from rollout.sync.manifest import BucketRef
from rollout.types import Chunk, ChunkResult, FinishReason, VersionSpan, append_span

logger = logging.getLogger(__name__)
STAGE_POLL_S = 0.05  # every look at a background transfer waits for the engine's step to end
CALL_TIMEOUT_S = 60.0  # an engine call pending at a death never resolves by itself (vLLM core_client)


class Shard:
    """Hosts one vLLM `AsyncLLM`.

    Args:
        rank: Data-parallel rank.
        model: The model served.
        engine: The expert-parallel group.
        sync: How weights arrive.
        initial_version: Version of the weights in the model directory.
    """

    def __init__(
        self, rank: int, model: ModelConfig, engine: EngineConfig, sync: SyncConfig, initial_version: int = 0
    ) -> None:
        self._rank = rank
        self._model, self._engine_config, self._sync = model, engine, sync
        self._version = initial_version
        self._initial_version = initial_version
        self._engine: Any = None
        self._stop_token_ids: tuple[int, ...] = ()
        self._stats: Any = None
        self._running: dict[str, str] = {}  # trajectory id → engine request id
        self._num_requests = 0
        self._num_tokens = 0
        self._on_gpu = bool(ray.get_gpu_ids())

    def rendezvous(self) -> Rendezvous:
        """Where the group can meet, on this shard's node. Asked of rank 0 only."""
        return Rendezvous(host=ray.util.get_node_ip_address(), rpc_port=free_port())

    async def start(self, rendezvous: Rendezvous | None) -> ShardInfo:
        """Start the engine; all ranks must start together, as they wait for each other.

        Raises:
            EngineDead: With vLLM's reason.
        """
        self._set_environment()
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.shard_stats import LastStats

        arguments = engine_args(
            self._model,
            self._engine_config,
            self._sync,
            rank=self._rank,
            rendezvous=rendezvous,
            on_gpu=self._on_gpu,
        )
        self._stats = LastStats()
        try:
            self._engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._stats.factory])
            num_local = sum(await self._rpc("longroll_num_local_experts"))
            await self._call(self._engine.update_weight_version(str(self._initial_version)))
        except LongrollError:
            raise
        except Exception as error:
            raise EngineDead(f"shard {self._rank} could not start: {error}") from error
        config = self._engine.vllm_config
        self._stop_token_ids = _stop_token_ids(config.model_config)
        return ShardInfo(
            rank=self._rank,
            num_experts=getattr(config.model_config.hf_text_config, "num_experts", 0) or 0,
            num_local_experts=num_local,
            kv_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            vocab_size=config.model_config.get_vocab_size(),
            max_model_len=config.model_config.max_model_len,
            num_workers=config.parallel_config.world_size,
        )

    def _set_environment(self) -> None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # keyed sampling is built on the V1 runner
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if self._on_gpu:
            return
        cores = sorted(os.sched_getaffinity(0))
        default = str(cores[self._rank % len(cores)])
        binds = (self._engine_config.omp_threads_bind or "").split("|")
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = binds[self._rank] if len(binds) > self._rank and binds[0] else default

    async def generate(self, chunk: Chunk) -> ChunkResult:
        """Run a chunk to its end.

        Returns:
            Its tokens; finish_reason ABORT, with the tokens so far, after an abort.

        Raises:
            EngineDead: The engine died; the chunk must be run elsewhere.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        self._num_requests += 1
        request_id = f"{chunk.trajectory_id}#{self._num_requests}"
        self._running[chunk.trajectory_id] = request_id
        began = time.monotonic()
        output: Any = None
        try:
            stream = self._engine.generate(
                {"prompt_token_ids": list(chunk.token_ids)}, self._sampling_params(chunk), request_id
            )
            async for latest in stream:  # one output, the final one
                output = latest
        except EngineDeadError as error:
            raise EngineDead(f"shard {self._rank}: {error}") from error
        finally:
            if self._running.get(chunk.trajectory_id) == request_id:
                del self._running[chunk.trajectory_id]
        return self._result(chunk, output, time.monotonic() - began)

    def _sampling_params(self, chunk: Chunk) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wanted = chunk.sampling
        stops = set(wanted.stop_token_ids)
        if not wanted.ignore_eos:
            stops |= set(self._stop_token_ids)
        return SamplingParams(
            max_tokens=chunk.max_tokens,
            temperature=wanted.temperature,
            top_k=wanted.top_k or 0,
            top_p=wanted.top_p,
            stop_token_ids=sorted(stops),
            ignore_eos=True,  # ends come from stop_token_ids alone
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={SEED_KEY: chunk.seed},
        )

    def _result(self, chunk: Chunk, output: Any, duration_s: float) -> ChunkResult:
        if output is None or not output.outputs:  # aborted before it was scheduled
            return ChunkResult(
                trajectory_id=chunk.trajectory_id,
                token_ids=(),
                logprobs=(),
                spans=(),
                finish_reason=FinishReason.ABORT,
                shard=self._rank,
                duration_s=duration_s,
            )
        completion = output.outputs[0]
        spans: list[VersionSpan] = []
        for span in completion.weight_versions or ():
            if span.end > span.start:
                append_span(spans, VersionSpan(version=int(span.version), start=span.start, stop=span.end))
        self._num_tokens += len(completion.token_ids)
        return ChunkResult(
            trajectory_id=chunk.trajectory_id,
            token_ids=tuple(completion.token_ids),
            logprobs=tuple(completion.logprobs.logprobs) if completion.token_ids else (),
            spans=tuple(spans),
            finish_reason=FinishReason(completion.finish_reason),
            shard=self._rank,
            num_cached_tokens=output.num_cached_tokens or 0,
            ttft_s=output.metrics.first_token_latency if output.metrics else 0.0,
            duration_s=duration_s,
        )

    async def abort(self, trajectory_ids: list[str]) -> None:
        """End running chunks; their `generate` calls return what they have. Unknown ids are ignored."""
        request_ids = [self._running[t] for t in trajectory_ids if t in self._running]
        if request_ids:
            await self._call(self._engine.abort(request_ids))

    async def stage(self, ref: BucketRef) -> None:
        """Copy a bucket aside on every worker and check its digests. Raises SyncRefused on a fault."""
        call = self._engine.collective_rpc("longroll_stage", args=(ref.to_json(),))
        outcomes = await self._call(call, self._sync.timeout_s)
        await self._until_done(
            outcomes, lambda: self._rpc("longroll_stage_outcome", ref.version), f"bucket {ref.index} of {ref.version}"
        )

    async def open_transport(self, rendezvous: Rendezvous, world_size: int) -> None:
        """Let every worker join the trainer's group; generation goes on. Raises SyncRefused on a fault.

        Args:
            rendezvous: Where the trainer, rank 0, waits.
            world_size: The trainer and the workers of all shards.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info = {
            "master_address": rendezvous.host,
            "master_port": rendezvous.rpc_port,
            "rank_offset": 1,
            "world_size": world_size,
        }
        await self._call(self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)))
        look = "longroll_transport_outcome"
        await self._until_done(await self._rpc(look), lambda: self._rpc(look), "weight transport")

    async def _until_done(
        self, outcomes: list[tuple[bool, str | None]], look: Callable[[], Awaitable[Any]], what: str
    ) -> None:
        """Wait until all workers have done what they do beside the engine; the first fault ends the wait."""
        deadline = time.monotonic() + self._sync.timeout_s
        while True:
            faults = [fault for _, fault in outcomes if fault is not None]
            if faults:
                raise SyncRefused(faults[0])
            if all(is_done for is_done, _ in outcomes):
                return
            if time.monotonic() > deadline:
                raise SyncRefused(f"{what}: not done within sync.timeout_s = {self._sync.timeout_s:g} s")
            await asyncio.sleep(STAGE_POLL_S)
            outcomes = await look()

    async def drop_stage(self, version: int) -> None:
        await self._rpc("longroll_drop_stage", version)

    async def pause(self, mode: InFlight) -> None:
        """Stop decoding; returns once this rank and its peers have stopped."""
        clear_cache = mode is not InFlight.KEEP or self._sync.recompute_kv
        timeout_s = self._sync.pause_timeout_s(mode)
        await self._call(self._engine.pause_generation(mode=mode.value, clear_cache=clear_cache), timeout_s)

    async def apply(self, version: int) -> None:
        """Load the staged version; only while paused, on all ranks together."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        timeout_s = self._sync.timeout_s
        request = WeightTransferUpdateRequest(update_info={"version": version})
        await self._call(self._engine.start_weight_update(), timeout_s)
        await self._call(self._engine.update_weights(request), timeout_s)
        await self._call(self._engine.finish_weight_update(str(version)), timeout_s)
        self._version = version
        self._stats.kv_usage_max = 0.0

    async def resume(self) -> None:
        """Decode again."""
        await self._call(self._engine.resume_generation())

    async def stats(self) -> ShardStats:
        last = self._stats.last
        return ShardStats(
            rank=self._rank,
            version=self._version,
            num_running=last.num_running_reqs,
            num_waiting=last.num_waiting_reqs,
            kv_usage=last.kv_cache_usage,
            kv_usage_max=self._stats.kv_usage_max,
            num_tokens_generated=self._num_tokens,
            num_preemptions=self._stats.num_preemptions,
        )

    async def shutdown(self) -> None:
        """End the engine's processes. The actor itself is killed by whoever made it."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await asyncio.to_thread(engine.shutdown)

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        return await self._call(self._engine.collective_rpc(method, args=args))

    async def _call(self, call: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await asyncio.wait_for(call, timeout_s)
        except TimeoutError as error:
            raise EngineDead(f"shard {self._rank}: no answer from the engine within {timeout_s:.0f} s") from error
        except EngineDeadError as error:
            raise EngineDead(f"shard {self._rank}: {error}") from error


def _stop_token_ids(model_config: Any) -> tuple[int, ...]:
    """End tokens that the model directory names (generation config first, then the model config)."""
    ids: set[int] = set()
    for source in (model_config.try_get_generation_config(), model_config.hf_config.to_dict()):
        value = source.get("eos_token_id")
        ids |= set(value) if isinstance(value, (list, tuple)) else ({value} if value is not None else set())
    return tuple(sorted(ids))
