"""Checks that need more than one section of the configuration.

An option that would have no effect on the chosen path is an error, not silence. Each check is a
function from a RunConfig; none of them looks at the machine.
"""

from __future__ import annotations

from rollout.config import ClusterConfig, EngineConfig, InFlight, RunConfig
from rollout.errors import InvalidRequest
from rollout.mismatch import MEASURABLE_KV
from rollout.trainer_config import DraftUpdateConfig, MismatchConfig, OverBudget, TrainerConfig
from rollout.types import SamplingParams

PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
CPU_KV_CACHE_DTYPES = ("auto", "int8_per_token_head")
GPU_KV_CACHE_DTYPES = (*CPU_KV_CACHE_DTYPES, "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head")


def check(config: RunConfig) -> None:
    """Run every check. Raises InvalidRequest on the first that fails."""
    for one in (
        _sampling,
        _room,
        _accelerator,
        _cpu_engine,
        _gpu_engine,
        _sync,
        _trainer,
        _draft,
        _mismatch,
        _workload,
    ):
        one(config)


def _sampling(config: RunConfig) -> None:
    sampling = config.sampling
    SamplingParams(
        max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    if sampling.n_samples_per_prompt < 1:
        raise InvalidRequest("sampling.n_samples_per_prompt", sampling.n_samples_per_prompt, "an integer ≥ 1")


def _room(config: RunConfig) -> None:
    limit = config.model.max_model_len
    if config.sampling.max_tokens >= limit:
        raise InvalidRequest(
            "sampling.max_tokens",
            config.sampling.max_tokens,
            f"less than model.max_model_len = {limit}, so that a prompt fits too",
        )
    eval_tokens = config.workload.eval_max_tokens
    if eval_tokens is not None and not 0 < eval_tokens < limit:
        raise InvalidRequest("workload.eval_max_tokens", eval_tokens, f"a number in [1, {limit}), or null")


def _accelerator(config: RunConfig) -> None:
    cluster, engine = config.cluster, config.engine
    if engine.tensor_parallel_size != 1:
        raise InvalidRequest(
            "engine.tensor_parallel_size",
            engine.tensor_parallel_size,
            "1: weights are overwritten in place, which knows no slices of tensors (use more engine.num_shards)",
        )
    if cluster.placement_strategy not in PLACEMENT_STRATEGIES:
        raise InvalidRequest(
            "cluster.placement_strategy", cluster.placement_strategy, f"one of {', '.join(PLACEMENT_STRATEGIES)}"
        )
    if engine.all2all_backend is not None and not engine.enable_expert_parallel:
        raise InvalidRequest(
            "engine.all2all_backend",
            engine.all2all_backend,
            "null: without engine.enable_expert_parallel it has no effect",
        )
    if cluster.num_gpus_per_node == 0:
        return
    have, want = cluster.num_nodes * cluster.num_gpus_per_node, engine.num_all_shards * engine.tensor_parallel_size
    if want > have:
        raise InvalidRequest(
            "engine.num_groups × engine.num_shards × engine.tensor_parallel_size",
            want,
            f"at most cluster.num_nodes × cluster.num_gpus_per_node = {have}",
        )


def _cpu_engine(config: RunConfig) -> None:
    if config.cluster.num_gpus_per_node > 0:
        return
    engine, default = config.engine, EngineConfig()
    if engine.all2all_backend is not None:
        raise InvalidRequest(
            "engine.all2all_backend",
            engine.all2all_backend,
            "null on CPU: DeepEP and its kin need GPUs (cluster.num_gpus_per_node)",
        )
    if config.sync.transport == "nccl":
        raise InvalidRequest("sync.transport", "nccl", "shared_memory on CPU (cluster.num_gpus_per_node = 0)")
    if (config.cluster.placement_strategy, config.cluster.num_nodes) != (ClusterConfig().placement_strategy, 1):
        got = f"{config.cluster.placement_strategy} on {config.cluster.num_nodes}"
        raise InvalidRequest("cluster.placement_strategy / num_nodes", got, "PACK on 1: no effect without GPUs")
    if engine.kv_cache_dtype not in CPU_KV_CACHE_DTYPES:
        raise InvalidRequest(
            "engine.kv_cache_dtype", engine.kv_cache_dtype, f"{' or '.join(CPU_KV_CACHE_DTYPES)} on CPU"
        )
    if not engine.enforce_eager:
        raise InvalidRequest("engine.enforce_eager", False, "true on CPU, where there are no graphs to capture")
    if engine.gpu_memory_utilization != default.gpu_memory_utilization:
        raise InvalidRequest(
            "engine.gpu_memory_utilization",
            engine.gpu_memory_utilization,
            "its default on CPU, where it has no effect; use engine.kv_cache_bytes",
        )
    bind = engine.omp_threads_bind
    if bind is not None and len(bind.split("|")) != engine.num_all_shards:
        raise InvalidRequest("engine.omp_threads_bind", bind, f"{engine.num_all_shards} core lists with '|' between")


def _gpu_engine(config: RunConfig) -> None:
    if config.cluster.num_gpus_per_node == 0:
        return
    engine, default = config.engine, EngineConfig()
    if engine.kv_cache_dtype not in GPU_KV_CACHE_DTYPES:
        raise InvalidRequest("engine.kv_cache_dtype", engine.kv_cache_dtype, f"one of {', '.join(GPU_KV_CACHE_DTYPES)}")
    if engine.omp_threads_bind is not None:
        raise InvalidRequest("engine.omp_threads_bind", engine.omp_threads_bind, "null on GPU")
    if engine.kv_cache_bytes is not None and engine.gpu_memory_utilization != default.gpu_memory_utilization:
        raise InvalidRequest(
            "engine.gpu_memory_utilization",
            engine.gpu_memory_utilization,
            "its default together with engine.kv_cache_bytes, which overrides it",
        )


def _sync(config: RunConfig) -> None:
    sync = config.sync
    if sync.transport == "nccl" and config.trainer.num_gpus_per_rank == 0:
        raise InvalidRequest(
            "sync.transport", "nccl", "shared_memory for a trainer on CPU (trainer.num_gpus_per_rank = 0)"
        )
    if sync.in_flight is InFlight.WAIT and sync.drain_timeout_s >= config.trainer.distributed_timeout_s:
        raise InvalidRequest(
            "sync.drain_timeout_s",
            sync.drain_timeout_s,
            f"less than trainer.distributed_timeout_s = {config.trainer.distributed_timeout_s:g}, "
            "the time for which the other trainer ranks wait for the sender",
        )
    if not sync.partial_rollout and sync.in_flight is not InFlight.ABORT:
        raise InvalidRequest(
            "sync.partial_rollout",
            False,
            f"true: sync.in_flight={sync.in_flight.value} never aborts, so it has no effect",
        )
    if not sync.recompute_kv and sync.in_flight is not InFlight.KEEP:
        raise InvalidRequest(
            "sync.recompute_kv", False, f"true: sync.in_flight={sync.in_flight.value} leaves no running KV to keep"
        )


def _trainer(config: RunConfig) -> None:
    trainer, default = config.trainer, TrainerConfig()
    if not trainer.use_tis and trainer.tis_cap != default.tis_cap:
        raise InvalidRequest("trainer.tis_cap", trainer.tis_cap, "trainer.use_tis=true with it")
    if config.sampling.n_samples_per_prompt < 2:
        raise InvalidRequest(
            "sampling.n_samples_per_prompt",
            config.sampling.n_samples_per_prompt,
            "≥ 2: GRPO compares the members of a group",
        )
    if config.sampling.temperature == 0:
        raise InvalidRequest("sampling.temperature", 0, "> 0: greedy members of a group are all the same")
    if config.trainer.zero_stage not in (1, 2, 3):  # without ZeRO, DeepSpeed reports no gradient norm in float32
        raise InvalidRequest("trainer.zero_stage", config.trainer.zero_stage, "1, 2 or 3")


def _draft(config: RunConfig) -> None:
    speculation = config.engine.speculation
    travels = speculation.enabled and speculation.draft_travels
    if config.trainer.draft != DraftUpdateConfig() and not travels:
        raise InvalidRequest(
            "trainer.draft", config.trainer.draft, "its defaults without engine.speculation.{enabled,draft_travels}"
        )


def _mismatch(config: RunConfig) -> None:
    mismatch, trainer = config.mismatch, config.trainer
    is_captured = config.engine.enable_return_routed_experts
    if trainer.replay_routing and not is_captured:
        raise InvalidRequest("trainer.replay_routing", True, "false without engine.enable_return_routed_experts")
    if mismatch.every_steps == 0:
        if mismatch != MismatchConfig():
            raise InvalidRequest(
                "mismatch", mismatch, "its defaults with mismatch.every_steps = 0: nothing is measured"
            )
        return
    if config.engine.kv_cache_dtype not in MEASURABLE_KV:
        expected = f"one of {', '.join(MEASURABLE_KV)} with mismatch.every_steps"
        raise InvalidRequest("engine.kv_cache_dtype", config.engine.kv_cache_dtype, expected)
    if mismatch.budget_kl.routing is not None and not is_captured:
        raise InvalidRequest(
            "mismatch.budget_kl.routing", mismatch.budget_kl.routing, "null without engine.enable_return_routed_experts"
        )
    can_replay = is_captured and not trainer.replay_routing
    if mismatch.action is OverBudget.TIGHTEN and not (trainer.use_tis or can_replay):
        raise InvalidRequest(
            "mismatch.action", "tighten", "another one: there is neither tis_cap nor routing to tighten"
        )


def _workload(config: RunConfig) -> None:
    if config.workload.eval_problems < 1:
        raise InvalidRequest("workload.eval_problems", config.workload.eval_problems, "an integer ≥ 1")
    reward = config.workload.reward
    if reward == "none":
        raise InvalidRequest("workload.reward", "none", "a reward function: training needs one")
