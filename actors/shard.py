"""A shard: one data-parallel rank of an expert-parallel group, as one vLLM engine in one Ray actor.

Owns the engine process group of its rank and nothing else. It knows nothing of queues, groups,
rewards or trainers; it runs chunks, and takes part in publications as the controller tells it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import replace
from typing import Any

import ray
import torch

from actors import routing_store
from actors.call_line import CALLS, CallServer
from actors.engine_args import engine_args
from actors.line import LineAddress, LineServer
from actors.ports import free_port
from actors.process import place_of_this_process
from actors.shard_environment import front_end_cores, move_threads, prepare_environment
from actors.shard_requests import ChunkRun, sampling_params, stop_token_ids
from actors.siblings import SiblingExchange, kinship
from actors.token_line import TOKENS, TokenSender
from actors.vllm_plugin import SEED_KEY
from actors.vllm_plugin.control import ControlLine
from actors.vllm_plugin.routing import routing_args
from actors.vllm_plugin.steps import Step
from rollout.config import EngineConfig, InFlight, ModelConfig, SyncConfig
from rollout.errors import EngineDead, LongrollError, SyncRefused
from rollout.fleet import Pace, Rendezvous, ShardInfo, ShardStats
from rollout.gateway.outbox import Outboxes
from rollout.governor.statistics import SpeculationRecord
from rollout.routing import RoutingRef
from rollout.speculation_config import DraftPolicy
from rollout.sync import segments
from rollout.sync.manifest import BucketRef
from rollout.types import Chunk, ChunkResult

logger = logging.getLogger(__name__)
ROUTING_WAIT_S = 5.0  # the worker learns of a request's end with its next step
SUBSCRIBER_PATIENCE_S = 60.0  # a subscriber that has not asked for tokens for so long is gone
CALL_TIMEOUT_S = 60.0  # an engine call pending at a death never resolves by itself (vLLM core_client)


class Shard:
    """Hosts one vLLM `AsyncLLM`.

    Args:
        rank: Among the shards of all groups, group by group.
        model: The model served.
        engine: The expert-parallel groups.
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
        self._lines: list[ControlLine] = []  # one to each worker
        self._running: dict[str, str] = {}  # trajectory id → engine request id
        self._num_requests = 0
        self._num_tokens = 0
        self._outboxes = Outboxes(SUBSCRIBER_PATIENCE_S)
        calls = CallServer({"generate": self.generate})
        self._line_server = LineServer({TOKENS: TokenSender(self._outboxes), CALLS: calls})
        self._on_gpu = ray.is_initialized() and bool(ray.get_gpu_ids())  # asking would start Ray
        shares = engine.speculation.enabled and "sibling" in engine.speculation.sources
        self._siblings = SiblingExchange(rank, self._workers) if shares else None

    def rendezvous(self) -> Rendezvous:
        """Where the group can meet, on this shard's node. Asked of rank 0 only."""
        return Rendezvous(host=ray.util.get_node_ip_address(), rpc_port=free_port())

    async def start(self, rendezvous: Rendezvous | None) -> ShardInfo:
        """Start the engine; all ranks must start together, as they wait for each other.

        Raises:
            EngineDead: With vLLM's reason.
        """
        cores = sorted(os.sched_getaffinity(0))
        prepare_environment(self._rank, self._engine_config.omp_threads_bind, on_gpu=self._on_gpu)
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.shard_stats import LastStats

        arguments = engine_args(
            self._model,
            self._engine_config,
            self._sync,
            rank=self._rank % self._engine_config.num_shards,
            rendezvous=rendezvous,
            on_gpu=self._on_gpu,
            initial_version=self._initial_version,
        )
        self._stats = LastStats()
        try:
            self._engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._stats.factory])
            lines = await self._rpc("longroll_open")
            self._lines = [ControlLine(address, key, f"shard {self._rank}") for address, key in lines]
            num_local = sum(await self._workers("num_local_experts"))
            if not self._on_gpu:
                move_threads(front_end_cores(self._rank, self._engine_config, cores))
        except LongrollError:
            raise
        except Exception as error:
            raise EngineDead(f"shard {self._rank} could not start: {error}") from error
        config = self._engine.vllm_config
        self._stop_token_ids = stop_token_ids(config.model_config)
        return ShardInfo(
            rank=self._rank,
            group=self._rank // self._engine_config.num_shards,
            num_experts=getattr(config.model_config.hf_text_config, "num_experts", 0) or 0,
            num_local_experts=num_local,
            kv_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            vocab_size=config.model_config.get_vocab_size(),
            max_model_len=config.model_config.max_model_len,
            num_workers=config.parallel_config.world_size,
            block_tokens=config.cache_config.block_size,
            place=place_of_this_process(),
        )

    async def generate(self, chunk: Chunk) -> ChunkResult:
        """Run a chunk to its end.

        Returns:
            Its tokens; finish_reason ABORT, with the tokens so far, after an abort.

        Raises:
            EngineDead: The engine died; the chunk must be run elsewhere.
        """
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        self._num_requests += 1
        request_id = f"{chunk.trajectory_id}#{self._num_requests}"
        self._running[chunk.trajectory_id] = request_id
        began = time.monotonic()
        run = ChunkRun(chunk, self._outboxes.find(chunk.stream.subscriber) if chunk.stream is not None else None)
        params = sampling_params(chunk, self._stop_token_ids, self._extra_args(chunk, request_id))
        prompt = tokens_input(list(chunk.token_ids))  # any other form vLLM prepares in a thread of its own, and back
        try:
            async for output in self._engine.generate(prompt, params, request_id):
                run.add(output)
        except EngineDeadError as error:
            raise EngineDead(f"shard {self._rank}: {error}") from error
        finally:
            if self._running.get(chunk.trajectory_id) == request_id:
                del self._running[chunk.trajectory_id]
        result = run.result(self._rank, time.monotonic() - began)
        self._num_tokens += len(result.token_ids)
        if self._siblings is not None:
            self._siblings.share()
        if self._captures_routing(chunk) and result.token_ids:
            result = replace(result, routing=await self._routing(chunk, request_id, len(result.token_ids)))
        return result

    async def _routing(self, chunk: Chunk, request_id: str, num_new_tokens: int) -> RoutingRef | None:
        """Where the experts of a chunk lie; None, which is counted in training, if they could not be had."""
        blobs = await self._workers("take_routing", request_id, ROUTING_WAIT_S)
        if blobs[0] is None:
            logger.warning("shard %d: got no routing for %s", self._rank, request_id)
            return None
        return routing_store.put(blobs[0], chunk, num_new_tokens)

    def _captures_routing(self, chunk: Chunk) -> bool:
        """Of what is trained on; a reference to it could not travel over a line either."""
        return self._engine_config.enable_return_routed_experts and chunk.stream is None

    def _extra_args(self, chunk: Chunk, request_id: str) -> dict[str, Any]:
        """What the plug-in is told about a request."""
        routing: dict[str, Any] = {}
        if self._captures_routing(chunk):
            routing = routing_args(request_id, routing_store.first_row(chunk))
        kin = {} if self._siblings is None else kinship(chunk)
        return {SEED_KEY: chunk.seed} | kin | routing

    async def line_address(self) -> LineAddress:
        """Where streams of tokens are to be had, and chunks can be given without Ray."""
        return await self._line_server.open(ray.util.get_node_ip_address())

    async def set_peers(self, shards: list[Any]) -> None:
        """All shards, in the order of their ranks: their trajectories may draft for each other."""
        if self._siblings is not None:
            self._siblings.set_peers(shards)

    async def take_siblings(self, delta: Any) -> None:
        """What another shard has generated."""
        if self._siblings is not None:
            await self._siblings.take(delta)

    async def turn_speculation(self, sources: list[str] | None = None, policy: str = DraftPolicy.GOVERNED) -> None:
        """Draft with these of the sources that the engine was started with only; None: with all, empty: not at all."""
        chosen = list(self._engine_config.speculation.sources) if sources is None else sources
        await self._workers("turn_speculation", chosen, policy)

    async def take_speculation(self) -> SpeculationRecord | None:
        """What speculation came to since the last call; None without it, or without a governor."""
        if not self._engine_config.speculation.enabled:
            return None
        record: SpeculationRecord | None = (await self._workers("take_speculation"))[0]
        return record

    async def abort(self, trajectory_ids: list[str]) -> None:
        """End running chunks; their `generate` calls return what they have. Unknown ids are ignored."""
        request_ids = [self._running[t] for t in trajectory_ids if t in self._running]
        if request_ids:
            await self._call(self._engine.abort(request_ids))

    async def abort_all(self) -> None:
        """End everything that runs here: whoever asked for it is gone."""
        await self.abort(list(self._running))

    async def pace(self) -> Pace:
        """What its engine has done; while it is busy its steps grow in number, or the engine hangs."""
        seen = self._stats
        return Pace(num_steps=seen.num_steps, num_tokens=seen.num_later_tokens, token_s=seen.later_s)

    async def begin(self, attempt: int, version: int, base: int | None) -> None:
        """Prepare every worker for a publication. Raises SyncRefused on a fault, as all of these do."""
        await self._workers("begin", attempt, version, base)

    async def stage(self, ref: BucketRef, payload: Any = None) -> None:
        """Let every worker write a bucket into its shadow and check its digests; decoding goes on.

        Args:
            ref: The bucket.
            payload: Its bytes, uint8, where they came through Ray's object store; they are put into this host's
                shared memory for the workers.
        """
        if payload is None:
            method = "stage" if ref.segment is not None else "receive"  # without a segment it is broadcast
            await self._workers(method, ref, timeout_s=self._sync.timeout_s)
            return
        segment, target = await asyncio.to_thread(segments.create, ref.num_bytes)
        try:
            await asyncio.to_thread(target.copy_, torch.from_numpy(payload))
            await self._workers("stage", replace(ref, segment=segment), timeout_s=self._sync.timeout_s)
        finally:
            segments.unlink(segment)

    async def verify(self, attempt: int) -> str:
        """Check that a publication is complete and make it ready to flip; returns its digest."""
        digests = set(await self._workers("verify", attempt, timeout_s=self._sync.timeout_s))
        if len(digests) > 1:
            raise SyncRefused(f"shard {self._rank}: its workers hold different weights: {sorted(digests)}")
        return digests.pop()

    async def arm(self, attempt: int) -> None:
        """From now on the flip happens before the first forward for which all ranks are armed."""
        await self._workers("arm", attempt)

    async def flip(self, attempt: int) -> int:
        """Flip now, between two steps; all ranks of the group must have been armed. Returns the live version."""
        self._version = min(await self._workers("flip", attempt))
        self._stats.kv_usage_max = 0.0
        return self._version

    async def drop(self, attempt: int) -> int:
        """Forget a publication. Returns the live version: the dropped one, if it had been flipped to already."""
        self._version = min(await self._workers("drop", attempt))
        return self._version

    async def live_version(self) -> int:
        self._version = min(await self._workers("live_version"))
        return self._version

    async def open_transport(self, rendezvous: Rendezvous, first_rank: int, world_size: int) -> None:
        """Let every worker join the trainer's broadcast group; generation goes on.

        Args:
            rendezvous: Where trainer rank 0 waits.
            first_rank: Rank of this shard's first worker in the group.
            world_size: The trainer's ranks, which come first, and the workers of all shards.
        """
        calls = [
            line.call("join", rendezvous, first_rank + i, world_size, timeout_s=self._sync.timeout_s)
            for i, line in enumerate(self._lines)
        ]
        await asyncio.gather(*calls)

    async def pause(self, mode: InFlight) -> None:
        """Stop decoding; returns once this rank and its peers have stopped."""
        timeout_s = self._sync.pause_timeout_s(mode)
        await self._call(self._engine.pause_generation(mode=mode.value, clear_cache=True), timeout_s)

    async def resume(self) -> None:
        """Decode again."""
        await self._call(self._engine.resume_generation())

    async def take_steps(self) -> list[Step]:
        """Forwards of the first worker since the last call: their votes, versions and times."""
        steps: list[Step] = (await self._workers("take_steps"))[0]
        return steps

    async def held_bytes(self) -> list[dict[str, int]]:
        """Bytes that each worker really holds, by what they are for."""
        return await self._workers("held_bytes")

    async def profile(self, is_on: bool) -> None:
        """Begin or end a trace of the workers, which the engine was configured for (vllm.profiler_config)."""
        await self._call(self._engine.start_profile() if is_on else self._engine.stop_profile())

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
            num_tokens_sampled=self._stats.num_tokens,
        )

    async def shutdown(self) -> None:
        """End the engine's processes. The actor itself is killed by whoever made it."""
        self._line_server.close()
        if self._engine is not None:
            engine, self._engine = self._engine, None
            for line in self._lines:
                line.close()
            self._lines = []
            await asyncio.to_thread(engine.shutdown)

    async def _workers(self, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """Call every worker beside its engine's loop; results in the order of ranks."""
        if not self._lines:
            raise EngineDead(f"shard {self._rank}: got a call to {method}, expected an engine that runs")
        calls = (line.call(method, *arguments, timeout_s=timeout_s) for line in self._lines)
        results = await asyncio.gather(*calls, return_exceptions=True)
        faults = [result for result in results if isinstance(result, BaseException)]
        if faults:
            raise faults[0]
        return results

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
