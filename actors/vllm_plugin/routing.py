"""Keeps the experts that every token went to, in a worker of the engine, until somebody asks for them.

Routing lies beside the KV cache: one row of expert ids for each KV slot, in host memory. So a token whose
KV came from the prefix cache has its routing too. When a request ends, its rows are gathered through its
block table, before the blocks can be given to others, and packed (rollout.routing).

The engine's loop only notes what is to be done; a thread of its own does it in that order (`RoutingLog`),
so that neither a device's copies nor the packing of long requests delay a step. Rows are those of the
forward after which a token was sampled that the request kept: what a preempted request prefills again does
not replace them. Knows nothing of trajectories, stores or trainers.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from actors.vllm_plugin.options import PluginOptions
from rollout.errors import InvalidRequest
from rollout.routing import Routing, id_dtype, pack

logger = logging.getLogger(__name__)
ID_KEY = "longroll_routing_id"  # SamplingParams.extra_args: name under which a request's routing is kept
FROM_KEY = "longroll_routing_from"  # position of the first token wanted
MAX_BYTES = 512 * 2**20  # packed routing that nobody has fetched yet; the oldest is dropped beyond it
NUM_PACKERS = 2


def routing_args(request_id: str, first_token: int) -> dict[str, Any]:
    """Entries of a request's extra_args that have its routing kept for `take`.

    Args:
        request_id: Unique in the engine (vLLM adds a random ending to the ids it is given).
        first_token: Position of the first token whose routing is wanted.
    """
    return {ID_KEY: request_id, FROM_KEY: first_token}


@dataclass(slots=True, kw_only=True)
class Watched:
    """A request whose routing is wanted. The counts are the engine loop's, the rows the log's thread's.

    Attributes:
        key: Name to fetch it by.
        first: Position of the first token wanted.
        num_computed: Positions whose rows the log will hold once it has caught up.
        stop_kept: End of the rows that were gathered already, at a preemption.
        rows: Those rows.
    """

    key: str
    first: int
    num_computed: int = 0
    stop_kept: int = 0
    rows: list[np.ndarray] = field(default_factory=list)


class RoutingLog:
    """Routing by KV slot, and the packed routing of requests that ended. Methods return at once but for `take`.

    Args:
        num_blocks: Of the KV cache.
        block_size: Tokens in one of them.
        num_layers: Layers with experts.
        top_k: Experts of a token.
        num_experts: In a layer, over all ranks.
        max_bytes: Most packed bytes kept.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_layers: int,
        top_k: int,
        num_experts: int,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._block_size, self._num_experts, self._max_bytes = block_size, num_experts, max_bytes
        self._slots = np.zeros((num_blocks * block_size, num_layers, top_k), dtype=id_dtype(num_experts))
        self._packers = ThreadPoolExecutor(NUM_PACKERS, thread_name_prefix="longroll-routing-pack")
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._watched: set[str] = set()
        self._packed: dict[str, Future[bytes]] = {}
        self._num_bytes = 0
        self.num_dropped = 0
        threading.Thread(target=self._work_off, name="longroll-routing", daemon=True).start()

    @property
    def num_buffer_bytes(self) -> int:
        return self._slots.nbytes

    def watch(self, key: str, first: int) -> Watched:
        with self._changed:
            self._watched.add(key)
        return Watched(key=key, first=first, stop_kept=first)

    def write(self, slots: torch.Tensor, ids: torch.Tensor, is_copied: Callable[[], None] | None) -> None:
        """Rows of a forward: slots int64 [T], ids [T, layers, places], both in host memory once `is_copied` returns."""
        self._work.put(partial(self._write, slots, ids, is_copied))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Blocks of KV were copied: (from, to)."""
        self._work.put(partial(self._copy_blocks, np.asarray(pairs, dtype=np.int64)))

    def keep(self, request: Watched, block_ids: Sequence[int]) -> None:
        """A request loses its blocks: gather what they hold of it."""
        self._gather(request, block_ids)
        request.num_computed = request.stop_kept = max(request.stop_kept, request.num_computed)

    def resume(self, request: Watched, num_tokens: int) -> None:
        """A preempted request begins again with that many tokens: forget rows whose sampled token it lost."""
        request.stop_kept = min(request.stop_kept, max(request.first, num_tokens - 1))
        self._work.put(partial(_truncate, request, request.stop_kept - request.first))

    def forget(self, request: Watched) -> None:
        """A request has ended without a token: nobody will ask for it."""
        with self._changed:
            self._watched.discard(request.key)
            self._changed.notify_all()

    def end(self, request: Watched, block_ids: Sequence[int]) -> None:
        """A request has ended: gather the rest of its rows and pack them all."""
        packed: Future[bytes] = Future()
        self._gather(request, block_ids)
        with self._changed:
            self._watched.discard(request.key)
            self._packed[request.key] = packed
            self._changed.notify_all()
        self._work.put(partial(self._submit, request, packed))

    def take(self, key: str, timeout_s: float) -> bytes | None:
        """The packed routing of a request, once; None if it is not known, was dropped, or is not there in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while key in self._watched:
                if not self._changed.wait(deadline - time.monotonic()):
                    return None
            packed = self._packed.get(key)
        if packed is None:
            return None
        try:
            blob = packed.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            return None
        except Exception:  # routing is a help to training, not worth a request
            logger.exception("routing of %s could not be packed", key)
            blob = None
        with self._changed:
            if self._packed.pop(key, None) is not None and blob is not None:
                self._num_bytes -= len(blob)
        return blob

    def _gather(self, request: Watched, block_ids: Sequence[int]) -> None:
        if request.num_computed > request.stop_kept:
            positions = np.arange(request.stop_kept, request.num_computed)
            blocks = np.asarray(block_ids, dtype=np.int64)
            slots = blocks[positions // self._block_size] * self._block_size + positions % self._block_size
            self._work.put(lambda: request.rows.append(self._slots[slots]))

    def _write(self, slots: torch.Tensor, ids: torch.Tensor, is_copied: Callable[[], None] | None) -> None:
        if is_copied is not None:
            is_copied()
        self._slots[slots.numpy()] = ids.numpy()

    def _copy_blocks(self, pairs: np.ndarray) -> None:
        blocks = self._slots.reshape(-1, self._block_size, *self._slots.shape[1:])
        blocks[pairs[:, 1]] = blocks[pairs[:, 0]]

    def _submit(self, request: Watched, packed: Future[bytes]) -> None:
        empty = np.empty((0, *self._slots.shape[1:]), dtype=self._slots.dtype)
        rows = np.concatenate([empty, *request.rows])
        routing = Routing(first_token=request.first, num_experts=self._num_experts, ids=rows)
        self._packers.submit(self._pack, routing, packed)

    def _pack(self, routing: Routing, packed: Future[bytes]) -> None:
        try:
            blob = pack(routing)
        except Exception as error:  # told to whoever fetches it
            packed.set_exception(error)
            return
        with self._changed:
            packed.set_result(blob)
            self._num_bytes += len(blob)
            for key in [k for k, one in self._packed.items() if one.done() and one is not packed]:
                if self._num_bytes <= self._max_bytes:
                    break
                dropped = self._packed.pop(key)
                self._num_bytes -= len(dropped.result()) if dropped.exception() is None else 0
                self.num_dropped += 1

    def _work_off(self) -> None:
        while True:
            work = self._work.get()
            try:
                work()
            except Exception:  # the thread must live on; what this leaves out is found by the digests and counts
                logger.exception("recording of routing failed")


def _truncate(request: Watched, num_rows: int) -> None:
    if request.rows:
        request.rows = [np.concatenate(request.rows)[:num_rows]]


class RoutingCaptureMixin:
    """Mix in before a vLLM V1 model runner; does nothing unless the engine's options ask for routing."""

    routing_log: RoutingLog | None = None
    _routing_capturer: Any = None
    _routing_layers: list[int]
    _routing_dtype: torch.dtype
    _routing_watched: dict[str, Watched]

    def take_routing(self, request_id: str, timeout_s: float) -> bytes | None:
        """Packed routing of an ended request, by the name given to `routing_args`; see `RoutingLog.take`."""
        return None if self.routing_log is None else self.routing_log.take(request_id, timeout_s)

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)  # type: ignore[misc]
        config = self.vllm_config  # type: ignore[attr-defined]
        if is_profiling or not PluginOptions.of(config).capture_routing:
            return
        from vllm.distributed.parallel_state import get_tp_group
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            RoutedExpertsCapturer,
            bind_routed_experts_capturer,
        )

        parallel, model = config.parallel_config, self.get_model()  # type: ignore[attr-defined]
        if parallel.pipeline_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
            raise InvalidRequest(
                "engine.enable_return_routed_experts",
                "pipeline or context parallelism",
                "engines in which every worker sees all layers and all tokens of its rank",
            )
        capturer = RoutedExpertsCapturer(self.max_num_tokens, config)  # type: ignore[attr-defined]
        bind_routed_experts_capturer(model, capturer)
        self._routing_capturer, self._routing_watched = capturer, {}
        self._routing_dtype = capturer.output_dtype
        self._routing_layers = sorted(part.layer_id for part in model.modules() if isinstance(part, MoERunner))
        if get_tp_group().rank_in_group == 0:  # the others' rows are the same
            self.routing_log = RoutingLog(
                num_blocks=self.kv_cache_config.num_blocks,  # type: ignore[attr-defined]
                block_size=self.input_batch.block_table[0].block_size,  # type: ignore[attr-defined]
                num_layers=len(self._routing_layers),
                top_k=config.model_config.get_num_experts_per_tok(),
                num_experts=config.model_config.get_num_experts(),
            )

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        num_tokens = scheduler_output.total_num_scheduled_tokens
        if self.routing_log is not None and num_tokens:
            slots = self.input_batch.block_table[0].slot_mapping.gpu[:num_tokens]  # type: ignore[attr-defined]
            self._write_routing(self.routing_log, slots, slice(num_tokens))
        return output

    def _write_routing(self, log: RoutingLog, slots: torch.Tensor, rows: slice | torch.Tensor) -> None:
        """Log the experts of some rows of the forward under way at these slots."""
        ids = self._routing_capturer.device_buffer[rows][:, self._routing_layers].to(self._routing_dtype)
        if slots.device.type == "cpu":
            log.write(slots.clone(), ids, None)
            return
        copied = torch.cuda.Event()
        host = slots.to("cpu", non_blocking=True), ids.to("cpu", non_blocking=True)
        copied.record()
        log.write(*host, copied.synchronize)

    def kv_moved(self, sources: torch.Tensor, slots: torch.Tensor) -> None:
        """The KV of rows of the forward under way has moved to other slots: routing follows it."""
        if self.routing_log is not None:
            self._write_routing(self.routing_log, slots, sources)

    def kv_rejected(self, request_id: str, num_rows: int) -> None:
        """The last rows of a request in the forward under way do not count: their drafts were wrong."""
        if self.routing_log is not None and request_id in self._routing_watched:
            self._routing_watched[request_id].num_computed -= num_rows

    def _update_states(self, scheduler_output: Any) -> Any:
        if self.routing_log is None:
            return super()._update_states(scheduler_output)  # type: ignore[misc]
        self._settle_routing(self.routing_log, scheduler_output)
        result = super()._update_states(scheduler_output)  # type: ignore[misc]
        self._watch_routing(self.routing_log, scheduler_output)
        return result

    def _settle_routing(self, log: RoutingLog, scheduler_output: Any) -> None:
        """Before this step's states: blocks of preempted and ended requests may be other requests' from here on."""
        requests, watched = self.requests, self._routing_watched  # type: ignore[attr-defined]
        for request_id in scheduler_output.preempted_req_ids or ():
            if request_id in watched:
                log.keep(watched[request_id], requests[request_id].block_ids[0])
        for request_id in scheduler_output.finished_req_ids:
            request, state = watched.pop(request_id, None), requests.get(request_id)
            if request is None or state is None:
                continue
            if state.output_token_ids:
                log.end(request, state.block_ids[0])
            else:
                log.forget(request)
        if scheduler_output.kv_cache_block_copies:
            log.copy_blocks(scheduler_output.kv_cache_block_copies)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, num_output_tokens in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            if request_id in cached.resumed_req_ids and request_id in watched:
                log.resume(watched[request_id], requests[request_id].num_prompt_tokens + num_output_tokens)

    def _watch_routing(self, log: RoutingLog, scheduler_output: Any) -> None:
        """After this step's states: note new requests, and how far each one's rows will reach."""
        for new in scheduler_output.scheduled_new_reqs:
            extra = (new.sampling_params.extra_args if new.sampling_params else None) or {}
            if ID_KEY in extra:
                self._routing_watched[new.req_id] = log.watch(extra[ID_KEY], extra[FROM_KEY])
        requests = self.requests  # type: ignore[attr-defined]
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self._routing_watched.get(request_id)
            if request is not None:
                request.num_computed = requests[request_id].num_computed_tokens + num_tokens
