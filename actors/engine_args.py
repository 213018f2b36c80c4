"""Translation of Longroll's model and engine configuration into vLLM's engine arguments.

Nothing here starts an engine; `vllm` is imported only when arguments are built, because importing
it reads environment variables that a shard sets first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.vllm_plugin import CPU_SCHEDULER, CPU_WORKER, GPU_SCHEDULER, GPU_WORKER, QUANTIZATIONS
from actors.vllm_plugin.options import PluginOptions
from rollout.config import EngineConfig, ModelConfig, SyncConfig
from rollout.errors import InvalidRequest
from rollout.fleet import Rendezvous

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs

INT4_ALL2ALL = (None, "allgather_reducescatter")  # the others bring kernels of their own for the experts
DEFAULT_CPU_KV_BYTES = 256 * 2**20


def engine_args(
    model: ModelConfig,
    engine: EngineConfig,
    sync: SyncConfig,
    *,
    rank: int,
    rendezvous: Rendezvous | None,
    on_gpu: bool,
    initial_version: int = 0,
) -> AsyncEngineArgs:
    """Arguments of one shard.

    Args:
        model: The model served.
        engine: The expert-parallel group; `engine.vllm` overrides anything set here, verbatim.
        sync: What happens to KV when weights change.
        rank: Data-parallel rank of the shard.
        rendezvous: Where the ranks meet; may be None for a single shard.
        on_gpu: False builds arguments for the CPU engine.
        initial_version: Version of the weights in the model directory.

    Raises:
        InvalidRequest: For an option that vLLM does not have, a missing rendezvous, NCCL without GPUs, or INT4
            weights with what they do not go with.
    """
    from vllm import AsyncEngineArgs

    if sync.transport == "nccl" and not on_gpu:
        raise InvalidRequest("sync.transport", "nccl", "shared_memory for engines on CPU")
    arguments: dict[str, object] = dict(
        model=model.path,
        dtype=engine.dtype or model.dtype,
        max_model_len=model.max_model_len,
        trust_remote_code=model.trust_remote_code,
        skip_tokenizer_init=True,  # tokens in, tokens out
        seed=0,
        tensor_parallel_size=engine.tensor_parallel_size,
        enable_expert_parallel=engine.enable_expert_parallel,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_cache_dtype=engine.kv_cache_dtype,
        enable_prefix_caching=engine.enable_prefix_caching,
        enforce_eager=engine.enforce_eager or not on_gpu,
        worker_cls=GPU_WORKER if on_gpu else CPU_WORKER,
        logprobs_mode="processed_logprobs",
        scheduler_cls=GPU_SCHEDULER if on_gpu else CPU_SCHEDULER,
        distributed_timeout_seconds=int(engine.distributed_timeout_s),
        cpu_distributed_timeout_seconds=int(engine.distributed_timeout_s),
    )
    options = PluginOptions(
        int4=engine.int4 if engine.quantization == "int4" else None,
        initial_version=initial_version,
        recompute_kv=sync.recompute_kv,
        capture_routing=engine.enable_return_routed_experts,
        speculation=engine.speculation if engine.speculation.enabled else None,
    )
    arguments |= _memory(engine, on_gpu) | _group(engine, rank, rendezvous) | _weights(model, engine, on_gpu)
    arguments |= _speculation(engine, on_gpu)
    if engine.all2all_backend is not None:
        arguments["all2all_backend"] = engine.all2all_backend
    arguments |= engine.vllm
    arguments["additional_config"] = options.to_additional_config() | engine.vllm.get("additional_config", {})
    unknown = sorted(set(engine.vllm) - set(AsyncEngineArgs.__dataclass_fields__))
    if unknown:
        raise InvalidRequest("engine.vllm", unknown, "names of vLLM engine arguments")
    return AsyncEngineArgs(**arguments)  # type: ignore[arg-type]


def _speculation(engine: EngineConfig, on_gpu: bool) -> dict[str, object]:
    """What engines that draft need; nothing for others."""
    if not engine.speculation.enabled:
        return {}
    if engine.tensor_parallel_size != 1:
        # Every tensor rank would draft by its own clock, and verify other trees than its peers.
        raise InvalidRequest("engine.tensor_parallel_size", engine.tensor_parallel_size, "1 with engine.speculation")
    if not on_gpu:
        return {}  # the platform chooses the attention
    # Drafts follow from what the step before has sampled, so steps cannot be scheduled ahead of it.
    return dict(attention_backend="CUSTOM", scheduler_cls=CPU_SCHEDULER, async_scheduling=False)


def _weights(model: ModelConfig, engine: EngineConfig, on_gpu: bool) -> dict[str, object]:
    """How weights are held: always by our own layers, so that they can be overwritten in place."""
    arguments: dict[str, object] = {"quantization": QUANTIZATIONS[engine.quantization]}
    if engine.quantization is None:
        return arguments | ({"moe_backend": "triton"} if on_gpu else {})
    _check_int4(engine.dtype or model.dtype, engine, on_gpu)
    return arguments


def _check_int4(dtype: str, engine: EngineConfig, on_gpu: bool) -> None:
    served = ("bfloat16",) if on_gpu else ("bfloat16", "float32")
    if dtype not in served:
        raise InvalidRequest("engine.dtype", dtype, f"{' or '.join(served)} with engine.quantization = int4")
    if engine.tensor_parallel_size != 1:
        raise InvalidRequest(
            "engine.tensor_parallel_size", engine.tensor_parallel_size, "1 with engine.quantization = int4"
        )
    if engine.all2all_backend not in INT4_ALL2ALL:
        raise InvalidRequest(
            "engine.all2all_backend", engine.all2all_backend, f"{INT4_ALL2ALL[1]} or null with INT4 experts"
        )


def _memory(engine: EngineConfig, on_gpu: bool) -> dict[str, object]:
    """Size and blocks of the KV cache; what is not given is left to vLLM, except for the size on CPU."""
    arguments: dict[str, object] = {}
    if engine.block_size is not None:
        arguments["block_size"] = engine.block_size
    if on_gpu:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    kv_cache_bytes = engine.kv_cache_bytes or (None if on_gpu else DEFAULT_CPU_KV_BYTES)
    if kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes
    return arguments


def _group(engine: EngineConfig, rank: int, rendezvous: Rendezvous | None) -> dict[str, object]:
    """The shard's place among the data-parallel ranks; nothing for a single shard."""
    if engine.num_shards == 1:
        return {}
    if rendezvous is None:
        raise InvalidRequest("rendezvous", None, f"one, for a group of {engine.num_shards} shards")
    return dict(
        data_parallel_size=engine.num_shards,
        data_parallel_rank=rank,
        data_parallel_size_local=1,
        data_parallel_address=rendezvous.host,
        data_parallel_rpc_port=rendezvous.rpc_port,
        dp_sync_interval=4,  # a pause waits for the next sync: 16 took 0.40 s, and 1 costs every step a fifteenth
    )
