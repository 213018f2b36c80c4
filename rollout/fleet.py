"""What shards, the controller and clients tell each other about themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

CONTROLLER_NAME = "longroll-controller"
"""Of the controller's actor, in the namespace of its service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one group meet: those of the engines, of the trainer, or of a weight transport."""

    host: str
    rpc_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A process of the cluster: Ray's id of its node, and its process id there."""

    node_id: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What the controller knows of the fleet, for whoever starts and stops processes.

    Attributes:
        dead_groups: Expert-parallel groups that must be started anew.
        num_groups_wanted: How many there shall be.
        surplus_groups: Groups beyond that number which run nothing any more: to be stopped.
        drained_groups: Groups that are given nothing, because an operator said so.
    """

    dead_groups: tuple[int, ...]
    num_groups_wanted: int
    surplus_groups: tuple[int, ...] = ()
    drained_groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """What a supervisor has done since it began; `num_failed` is by the class of the error."""

    num_controller_restarts: int = 0
    num_group_restarts: int = 0
    num_groups_added: int = 0
    num_groups_removed: int = 0
    num_failed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """A shard that has started.

    Attributes:
        rank: Among the shards of all groups, group by group.
        group: Which group; the ranks of one wait for each other in collectives, so they die together.
        num_experts: Routed experts of a layer; 0 for a dense model.
        num_local_experts: How many of them this shard's workers hold together.
        kv_tokens: Tokens that its KV cache holds.
        vocab_size: Token ids are in [0, vocab_size).
        max_model_len: Longest prompt + output in tokens.
        num_workers: Its engine's worker processes, one for each device.
        block_tokens: Tokens of one block of the KV cache.
        place: Its actor's process; what its engine consists of dies with it. None in tests without processes.
    """

    rank: int
    num_experts: int
    num_local_experts: int
    kv_tokens: int
    vocab_size: int
    max_model_len: int
    group: int = 0
    num_workers: int = 1
    block_tokens: int = 16
    place: Place | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Of an engine, counted since its start.

    Attributes:
        num_steps: That have delivered something.
        num_tokens: Sampled after the first of their chunk.
        token_s: Seconds from the token before to each of those, summed.
    """

    num_steps: int
    num_tokens: int = 0
    token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStats:
    """A shard at one moment. `kv_usage` is a share of the KV cache, `kv_usage_max` its peak since the last sync.

    `num_tokens_generated` counts tokens of chunks that ended, `num_tokens_sampled` those of running ones too.
    """

    rank: int
    version: int
    num_running: int
    num_waiting: int
    kv_usage: float
    num_tokens_generated: int
    num_preemptions: int
    kv_usage_max: float = 0.0
    num_tokens_sampled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One publication that succeeded.

    Attributes:
        version: The version now live.
        num_tensors: Tensors of the model, changed or not.
        num_bytes: Bytes that travelled (rows and masks), counted once however many shards read them.
        num_bytes_full: Bytes of the whole model as it is served; what a full publication sends.
        num_rows_changed: Rows that travelled; all rows in a full publication.
        stage_s: Seconds from begin to the last bucket staged, while generation went on.
        flip_s: Seconds from the order to commit until all shards had flipped. Generation goes on in it,
            except for `stall_s`.
        stall_s: Seconds from the order to pause until all shards decode again, with the policy `wait`
            including what was running; 0 without a pause (policy `keep`).
        ranks_lost: Shards that did not come along and must be restarted; their group does not serve.
    """

    version: int
    num_tensors: int
    num_bytes: int
    num_bytes_full: int
    num_rows_changed: int
    stage_s: float
    flip_s: float
    stall_s: float
    ranks_lost: tuple[int, ...] = ()

    @classmethod
    def unknown(cls, version: int) -> SyncReport:
        """Of a publication that succeeded, but whose report was lost with its controller."""
        return cls(
            version=version,
            num_tensors=0,
            num_bytes=0,
            num_bytes_full=0,
            num_rows_changed=0,
            stage_s=0.0,
            flip_s=0.0,
            stall_s=0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStats:
    """The service at one moment; counts are since its controller's start.

    `num_failed` (trajectories) and `num_group_deaths` are by reason: rollout.scheduler.records FailureKind, DeathKind.
    `num_interactive` are users' completions under way, of which `admission_bound` are let in; `num_refused` are users'
    requests that were not, by reason (rollout.scheduler.admission).
    """

    live_version: int
    num_queued: int
    num_running: int
    num_finished: int
    num_aborted: int
    num_failed: dict[str, int] = field(default_factory=dict)
    num_tokens_generated: int = 0
    num_tokens_discarded: int = 0
    tokens_per_s: float = 0.0
    num_syncs: int = 0
    num_syncs_refused: int = 0
    num_clients: int = 0
    num_retries: int = 0
    num_groups_expired: int = 0
    num_chunks: int = 0
    num_migrations: int = 0
    num_cuts: int = 0
    num_trimmed: int = 0
    num_regenerated: int = 0
    num_tokens_restored: int = 0
    num_journal_waits: int = 0
    num_internal_errors: int = 0
    num_groups_wanted: int = 0
    num_interactive: int = 0
    admission_bound: int = 0
    num_refused: dict[str, int] = field(default_factory=dict)
    drained_groups: tuple[int, ...] = ()
    num_group_deaths: dict[str, int] = field(default_factory=dict)
    supervision: Supervision = field(default_factory=Supervision)
    shards: tuple[ShardStats, ...] = ()
