"""Options of the HTTP gateway."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.errors import InvalidRequest, check_positive


@dataclass(kw_only=True)
class GatewayConfig:
    """Where the gateway listens, whom it lets in, and how much at once."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 = all interfaces of the replica's node
    port: int = 8000  # TCP port of every replica; replicas of one node share it
    num_replicas: int = 1  # Ray Serve replicas; several nodes need a load balancer of their own in front
    model_name: str | None = None  # name that clients give and /v1/models tells; None = model.path
    keys_file: str | None = None  # hashes of the API keys; None = <run_dir>/keys.json
    max_body_bytes: int = 8 * 2**20  # a larger request is answered 413
    requests_per_s: float = 1000.0  # of one API key, in the long run; more are answered 429
    burst_requests: int = 2000  # that one API key may send at once
    max_choices_per_request: int = 1024  # prompts × n of one request; more are answered 400
    max_open_choices: int = 2048  # completions under way in one replica; more are answered 429
    # A completion that is expected to wait longer than this for an engine is answered 429, so that those which are
    # admitted have their first token in time.
    max_wait_s: float = 0.1
    interactive_priority: int = -1  # of completions in the scheduler; lower is served first, rollouts have 0
    # Tokens of a stream are gathered for so long before they are sent on: fewer messages, but later tokens. At most 50.
    coalesce_ms: float = 40.0
    idempotency_ttl_s: float = 3600.0  # how long an answer is kept for a repeated Idempotency-Key
    idempotency_bytes: int = 64 * 2**20  # of all kept answers together; the oldest go first
    # Reward functions that rollouts over HTTP may name: any other name would import code of the caller's choice.
    rewards: tuple[str, ...] = ("none", "reasoning_gym")
    weights_root: str | None = None  # directory that rollbacks may take weights from; None = the model's own only
    drain_timeout_s: float = 60.0  # on SIGTERM, the longest time that what is under way may take to end

    def __post_init__(self) -> None:
        check_positive(
            "gateway",
            num_replicas=self.num_replicas,
            max_body_bytes=self.max_body_bytes,
            requests_per_s=self.requests_per_s,
            burst_requests=self.burst_requests,
            max_choices_per_request=self.max_choices_per_request,
            max_open_choices=self.max_open_choices,
            max_wait_s=self.max_wait_s,
            idempotency_ttl_s=self.idempotency_ttl_s,
            idempotency_bytes=self.idempotency_bytes,
            drain_timeout_s=self.drain_timeout_s,
        )
        if not 0 <= self.port < 65536:
            raise InvalidRequest("gateway.port", self.port, "a port, or 0 for any free one")
        if not 0 < self.coalesce_ms <= 50:
            raise InvalidRequest("gateway.coalesce_ms", self.coalesce_ms, "a number in (0, 50]")
