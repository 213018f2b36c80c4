"""Every option of Longroll with its default, meaning, unit and effect.

YAML in conf/ selects and overrides these; an unknown key is an error. Each component receives only
its own section. Validation that needs one section lives in its `__post_init__`; checks across
sections live in `launch/compose.py`. What the trainer alone is told is in `rollout/trainer_config.py`, speculation's
options in `rollout/speculation_config.py`, the HTTP gateway's in `rollout/gateway_config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rollout.errors import InvalidRequest, check_positive
from rollout.gateway_config import GatewayConfig
from rollout.speculation_config import SpeculationConfig
from rollout.trainer_config import MismatchConfig, TrainerConfig


class InFlight(str, Enum):
    """What happens to running generations when new weights arrive (the usual three pause modes)."""

    WAIT = "wait"
    ABORT = "abort"
    KEEP = "keep"


@dataclass(kw_only=True)
class ModelConfig:
    """The policy being served and trained."""

    path: str = "models/tiny"  # Hugging Face model directory (config, safetensors, tokenizer, chat template)
    dtype: str = "float32"  # activation and weight dtype in the engine and the trainer
    max_model_len: int = 2048  # longest prompt + output in tokens; bounds KV use of one sequence
    trust_remote_code: bool = False  # let the model directory run its own code

    def __post_init__(self) -> None:
        check_positive("model", max_model_len=self.max_model_len)


@dataclass(kw_only=True)
class Int4Config:
    """Symmetric group-wise INT4 weights; used with engine.quantization = int4."""

    group_size: int = 64  # input features that share a scale: 32, 64 or 128; smaller = more accurate, more bytes
    # Tensors whose name contains one of these stay in the activation dtype (norms always do).
    skip: tuple[str, ...] = ("lm_head", "embed_tokens", "mlp.gate.")

    def __post_init__(self) -> None:
        if self.group_size not in (32, 64, 128):
            raise InvalidRequest("engine.int4.group_size", self.group_size, "32, 64 or 128")


@dataclass(kw_only=True)
class EngineConfig:
    """Expert-parallel groups of engines; a shard is one data-parallel rank of a group."""

    num_shards: int = 2  # data-parallel ranks of a group = Ray actors; experts are split over shards × tensor ranks
    num_groups: int = 1  # groups, each with all experts; they share nothing, and one's death leaves the others serving
    tensor_parallel_size: int = 1  # ranks each shard spreads its attention over
    enable_expert_parallel: bool = True  # split the experts over all ranks instead of slicing each expert
    all2all_backend: str | None = (
        None  # e.g. deepep_low_latency or deepep_high_throughput on GPUs; None = vLLM's default
    )
    max_num_seqs: int = 64  # sequences decoded together on one shard
    max_num_batched_tokens: int = 2048  # tokens in one step of one shard; larger = faster prefill, longer steps
    kv_cache_bytes: int | None = None  # KV cache of one shard in bytes; None = from gpu_memory_utilization
    gpu_memory_utilization: float = 0.90  # share of device memory the engine may take (GPU only)
    dtype: str | None = None  # activation dtype of the engine; None = model.dtype, which the trainer uses
    quantization: str | None = None  # weights: None = in the activation dtype, int4 = symmetric group-wise INT4
    int4: Int4Config = field(default_factory=Int4Config)  # how, with quantization = int4
    # Element type of the KV cache: auto = the activation dtype; int8_per_token_head = INT8 with one scale for each
    # token and head, which about halves it; fp8 on GPUs.
    kv_cache_dtype: str = "auto"
    block_size: int | None = None  # tokens in one KV block; None = vLLM's default for the platform
    enable_prefix_caching: bool = True  # members of a group share their prompt's KV
    enforce_eager: bool = True  # no graph capture (always so on CPU)
    # Keep the experts chosen for every token and send them with the trajectories, for trainer.replay_routing and the
    # routing figure of the mismatch budget. Host memory: layers × experts of a token bytes for each token of KV cache.
    enable_return_routed_experts: bool = False
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)  # drafts that are verified in the engine
    omp_threads_bind: str | None = None  # CPU only: core list of each shard, '|' between shards; None = one core each
    distributed_timeout_s: float = (
        300.0  # a rank silent for this long in a collective, also while they meet at the start, is taken for dead
    )
    start_timeout_s: float = 600.0  # longest wait for all engines to become ready
    vllm: dict[str, Any] = field(default_factory=dict)  # passed verbatim to vLLM's AsyncEngineArgs

    def __post_init__(self) -> None:
        check_positive(
            "engine",
            num_shards=self.num_shards,
            num_groups=self.num_groups,
            tensor_parallel_size=self.tensor_parallel_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            distributed_timeout_s=self.distributed_timeout_s,
            start_timeout_s=self.start_timeout_s,
        )
        if self.kv_cache_bytes is not None:
            check_positive("engine", kv_cache_bytes=self.kv_cache_bytes)
        if self.quantization not in (None, "int4"):
            raise InvalidRequest("engine.quantization", self.quantization, "int4, or null for none")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise InvalidRequest("engine.dtype", self.dtype, "float32, bfloat16, float16, or null for model.dtype")

    @property
    def num_all_shards(self) -> int:
        """Shards of all groups."""
        return self.num_groups * self.num_shards


@dataclass(kw_only=True)
class SamplingConfig:
    """How rollouts are sampled (the same fields as rollout.types.SamplingParams, plus the group size)."""

    n_samples_per_prompt: int = 8  # members of a GRPO group
    max_tokens: int = 512  # longest output of one trajectory in tokens
    temperature: float = 1.0  # 0 = greedy
    top_k: int | None = None  # None = off
    top_p: float = 1.0  # 1 = off


class OnStale(str, Enum):
    """What becomes of a trajectory whose first token would be older than max_staleness versions."""

    WAIT = "wait"  # a publication waits until it has ended; what is too old all the same starts anew
    REGENERATE = "regenerate"  # its tokens are dropped (and counted) and it starts anew
    DROP = "drop"  # it fails, counted with the reason


@dataclass(kw_only=True)
class DispatchConfig:
    """Who runs next, where, and for how long."""

    # divided: chunks, longest expected first, KV reserved; partial: whole trajectories on the least loaded shard;
    # static: groups dealt to the shards in turn. See rollout.scheduler.policies.
    policy: str = "divided"
    # Policy divided: a trajectory is cut after so many tokens, made durable, and scheduled again; what a crash loses
    # is at most one chunk of each trajectory that was running. None = not cut.
    chunk_tokens: int | None = 2048  # up to a block of KV more, so that a continuation finds its whole prefix

    def __post_init__(self) -> None:
        if self.policy not in ("static", "partial", "divided"):
            raise InvalidRequest("scheduler.policy", self.policy, "static, partial or divided")
        if self.chunk_tokens is not None:
            check_positive("scheduler", chunk_tokens=self.chunk_tokens)


@dataclass(kw_only=True)
class AdmissionConfig:
    """What users' completions that are let in shall keep; those that would not are answered 429. See docs/tuning.md."""

    ttft_target_s: float | None = 0.2  # time to first token, from request to stream; None = not looked at
    tpot_target_s: float | None = 0.05  # time per output token after the first, mean of a request; None = not looked at

    def __post_init__(self) -> None:
        for name in ("ttft_target_s", "tpot_target_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                expected = "seconds > 0, or null for no target"
                raise InvalidRequest(f"scheduler.admission.{name}", value, expected)


@dataclass(kw_only=True)
class SchedulerConfig(DispatchConfig):
    """Queues of the controller."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)  # of users' completions; never of rollouts

    max_running_per_shard: int = 64  # chunks in flight on one shard; more only queue inside the engine
    max_staleness: int | None = None  # most versions between a trajectory's first token and its last; None = no bound
    on_stale: OnStale = OnStale.REGENERATE  # what happens to one that would be older
    client_timeout_s: float = 600.0  # a client silent for this long has its unfinished work aborted
    max_queued_trajectories: int = 200_000  # submissions beyond this are refused
    max_retries: int = 2  # times a chunk is tried again elsewhere after its engine died
    num_reward_workers: int = 2  # parallel reward processes
    reward_timeout_s: float = 10.0  # a reward that takes longer fails its trajectory, with the reason

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            "scheduler",
            max_running_per_shard=self.max_running_per_shard,
            client_timeout_s=self.client_timeout_s,
            num_reward_workers=self.num_reward_workers,
            reward_timeout_s=self.reward_timeout_s,
        )
        if self.max_staleness is not None and self.max_staleness < 0:
            raise InvalidRequest("scheduler.max_staleness", self.max_staleness, "an integer ≥ 0, or null for no bound")


@dataclass(kw_only=True)
class SupervisorConfig:
    """When something is taken for dead, and how it comes back."""

    enabled: bool = True  # start dead groups of shards and a dead controller anew while the service runs
    check_every_s: float = 2.0  # between two looks
    hang_timeout_s: float = 120.0  # a busy engine without a step, or a silent controller, is dead after so long
    retry_s: float = 30.0  # after a group failed to come back
    engine_wait_s: float = 900.0  # longest time that trajectories wait when no engine is alive; then they fail

    def __post_init__(self) -> None:
        check_positive(
            "supervisor",
            check_every_s=self.check_every_s,
            hang_timeout_s=self.hang_timeout_s,
            retry_s=self.retry_s,
            engine_wait_s=self.engine_wait_s,
        )


@dataclass(kw_only=True)
class SyncConfig:
    """How new weights reach the shards."""

    in_flight: InFlight = InFlight.KEEP  # running generations: finish first, abort, or go on under the new weights
    partial_rollout: bool = True  # after an abort, keep the tokens so far and continue under the new version
    recompute_kv: bool = True  # keep mode: re-prefill running sequences under the new weights
    bucket_bytes: int = 256 * 2**20  # most encoded bytes in one message; four of each sender are in transit at most
    # shared_memory (one host, CPU or GPU), object_store (Ray's; any hosts, CPU or GPU) or nccl (broadcasts between
    # GPUs of any hosts; not run so far)
    transport: str = "shared_memory"
    timeout_s: float = 120.0  # longest time one stage of a publication may take before it is refused
    drain_timeout_s: float = (
        300.0  # wait mode: longest time to finish what is running; below trainer.distributed_timeout_s
    )

    def __post_init__(self) -> None:
        check_positive(
            "sync", bucket_bytes=self.bucket_bytes, timeout_s=self.timeout_s, drain_timeout_s=self.drain_timeout_s
        )
        if self.transport not in ("shared_memory", "object_store", "nccl"):
            raise InvalidRequest("sync.transport", self.transport, "shared_memory, object_store or nccl")

    def pause_timeout_s(self, mode: InFlight) -> float:
        """Longest time until all shards have stopped."""
        return self.drain_timeout_s if mode is InFlight.WAIT else self.timeout_s

    @property
    def publication_timeout_s(self) -> float:
        """Longest time any one message of a publication may take, as a sum over its stages."""
        return self.pause_timeout_s(self.in_flight) + 5 * self.timeout_s


@dataclass(kw_only=True)
class WorkloadConfig:
    """Where prompts come from and how answers are scored."""

    task: str = "chain_sum"  # a reasoning-gym data set
    task_options: dict[str, int] = field(default_factory=dict)  # its generator options
    reward: str = "reasoning_gym"  # reward function: a known name or "package.module:function"
    eval_problems: int = 256  # held-out problems scored before and after
    eval_max_tokens: int | None = None  # output limit in evaluation; None = sampling.max_tokens


@dataclass(kw_only=True)
class ClusterConfig:
    """Where actors run."""

    address: str | None = None  # Ray address; None = join the job's cluster, or start a local one
    namespace: str = "longroll"  # Ray namespace; two runs of one name on one cluster exclude each other
    num_nodes: int = 1  # nodes the engines spread over
    num_gpus_per_node: int = 0  # GPUs of each; 0 = CPU
    placement_strategy: str = "PACK"  # Ray placement strategy of the engine's bundles
    num_cpus_per_shard: float = 0.5  # Ray CPU resource of a shard's actor
    num_cpus_per_trainer: float = 0.25  # Ray CPU resource of a trainer rank
    dashboard: bool = False  # start Ray's dashboard with a local cluster


@dataclass(kw_only=True)
class MonitorConfig:
    """What is shown and kept of a run."""

    wandb_mode: str = "offline"  # online, offline or disabled; offline needs no account
    wandb_project: str = "longroll"  # W&B project
    wandb_run_id: str | None = None  # W&B run to resume; None = derived from run_dir
    progress: str = "auto"  # auto, rich, plain or off
    picture: bool = True  # write progress.png at the end

    def __post_init__(self) -> None:
        if self.wandb_mode not in ("online", "offline", "disabled"):
            raise InvalidRequest("monitor.wandb_mode", self.wandb_mode, "online, offline or disabled")
        if self.progress not in ("auto", "rich", "plain", "off"):
            raise InvalidRequest("monitor.progress", self.progress, "auto, rich, plain or off")


@dataclass(kw_only=True)
class JournalConfig:
    """The durable store of rollouts."""

    # sqlite:///relative/path, sqlite:////absolute/path or postgresql://…; None = in memory: the same calls, but nothing
    # survives the controller. A SQLite file must be on a local disk of the controller's node.
    dsn: str | None = None
    group_commit_ms: float = 5.0  # how long a write waits for others to share its transaction with
    synchronous: str = "full"  # full = survives a power cut; normal = survives the death of the process only
    retention_s: float = 86_400.0  # tokens of an acknowledged group are kept for so long, for export and replay
    owner_wait_s: float = 5.0  # longest wait at start for a previous owner that is on its way out
    check_on_open: bool = True  # look through a SQLite file for damage at start (about a second for each GB)

    def __post_init__(self) -> None:
        check_positive("journal", retention_s=self.retention_s)
        if self.group_commit_ms < 0 or self.owner_wait_s < 0:
            got = f"{self.group_commit_ms}, {self.owner_wait_s}"
            raise InvalidRequest("journal.group_commit_ms, owner_wait_s", got, "numbers ≥ 0")
        if self.dsn is not None and not self.dsn.startswith(("sqlite:///", "postgresql://", "postgres://")):
            raise InvalidRequest("journal.dsn", self.dsn, "sqlite:///path, postgresql://…, or null for none")
        if self.synchronous not in ("full", "normal"):
            raise InvalidRequest("journal.synchronous", self.synchronous, "full or normal")


@dataclass(kw_only=True)
class RunConfig:
    """A whole experiment; only launch/ sees it."""

    run_dir: str = "runs/run"  # checkpoints, W&B files, summary.json and progress.png
    resume: bool = True  # continue from the newest checkpoint in run_dir when there is one
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    journal: JournalConfig = field(default_factory=JournalConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
