"""The records of a rollout: prompt, group, trajectory, chunk, and their legal states.

Owns no behaviour beyond validation and bookkeeping on one record; knows nothing of queues, models,
engines or trainers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rollout.errors import InvalidRequest
from rollout.routing import RoutingRef
from rollout.streaming import TokenStream


class FinishReason(str, Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Status(str, Enum):
    """Life of a trajectory. `PENDING` covers queued and running; what has ended may still fail to be scored."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


_LEGAL = {
    Status.PENDING: {Status.COMPLETED, Status.TRUNCATED, Status.ABORTED, Status.FAILED},
    Status.COMPLETED: {Status.FAILED},  # its reward raised
    Status.TRUNCATED: {Status.FAILED},
    Status.ABORTED: set(),
    Status.FAILED: set(),
}


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""What vLLM takes as it is, beside 0."""
LEAST_FLOAT32 = 2.0**-126
"""The least normal number of the format that engines sample in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. A token is argmax(processed logits / T + Gumbel(seed, position)).

    Attributes:
        max_tokens: Most tokens to generate, ≥ 1.
        temperature: T, 0 for greedy; else in [0.01, 2]: vLLM refuses more, and takes 0.01 for less.
        top_k: Keep the k most likely tokens, k < 2**31; None keeps all.
        top_p: Keep the smallest set of tokens whose mass reaches p, a normal float32 in (0, 1].
        stop_token_ids: Tokens that end a generation (kept as its last token).
        ignore_eos: Go on past the model's own end token (for benchmarks).
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequest("max_tokens", self.max_tokens, "an integer ≥ 1")
        # What engines cannot hold would end in them, and take everybody's requests along.
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            expected = f"0, or a number in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE:g}]"
            raise InvalidRequest("temperature", self.temperature, expected)
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            raise InvalidRequest("top_k", self.top_k, "an integer in [1, 2**31), or None for off")
        if not LEAST_FLOAT32 <= self.top_p <= 1:
            raise InvalidRequest("top_p", self.top_p, f"a number in [{LEAST_FLOAT32:.3g}, 1]")
        if not all(0 <= token < 2**31 for token in self.stop_token_ids):
            raise InvalidRequest("stop_token_ids", list(self.stop_token_ids), "integers in [0, 2**31)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as token ids, with whatever its reward needs.

    Attributes:
        token_ids: The prompt, at least one token.
        prompt_id: Identifies the prompt across visits (for example "chain_sum/17").
        metadata: Plain picklable data for the reward function; not interpreted here.
    """

    token_ids: tuple[int, ...]
    prompt_id: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, stop) of an output were sampled under weight version `version`."""

    version: int
    start: int
    stop: int


def append_span(spans: list[VersionSpan], span: VersionSpan) -> None:
    """Append `span`, merging it into the last one when the version is the same.

    Raises:
        ValueError: If the span is empty or does not start where the last one stops.
    """
    last_stop = spans[-1].stop if spans else 0
    if span.start != last_stop or span.stop <= span.start:
        raise ValueError(f"version span: got {span}, expected a non-empty one that starts at {last_stop}")
    if spans and spans[-1].version == span.version:
        spans[-1] = VersionSpan(version=span.version, start=spans[-1].start, stop=span.stop)
    else:
        spans.append(span)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The unit of scheduling: continue one trajectory by at most `max_tokens` tokens.

    Attributes:
        trajectory_id: Key of the trajectory under way, unique in the service: "<handle>:<group_id>/<sample_index>".
        token_ids: Prompt followed by the tokens generated so far.
        num_prompt_tokens: How many of `token_ids` are the prompt.
        max_tokens: Budget of this chunk.
        seed: Seed of the trajectory (see rollout.seeds).
        sampling: Parameters of the trajectory (its own max_tokens is the total, not this chunk's).
        stream: Who follows its tokens as they come; None: nobody.
    """

    trajectory_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    max_tokens: int
    seed: int
    sampling: SamplingParams
    stream: TokenStream | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCounts:
    """What speculation came to.

    Attributes:
        trees: That were verified, one a step at most.
        nodes: Tokens drafted in them.
        accepted: Of those, tokens that the target sampled too; a step gives one more than it accepts.
    """

    trees: int = 0
    nodes: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkResult:
    """What an engine returned for a chunk; index 0 is the first token of the chunk.

    Attributes:
        token_ids: New tokens (may be fewer than asked, and none after an abort).
        logprobs: Log-probability of each under the distribution it was drawn from.
        spans: Weight versions of the new tokens, indexed from 0.
        finish_reason: LENGTH when only the budget ended it.
        shard: Rank of the shard that ran it.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        ttft_s: Seconds from submission to the engine until the first token.
        duration_s: Seconds from submission to the engine until the last token.
        routing: Experts of the rows this chunk adds (see rollout.routing); None when they were not captured.
        drafts: What speculation came to; None from an engine without it, and after an abort.
    """

    trajectory_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    shard: int
    num_cached_tokens: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0
    routing: RoutingRef | None = None
    drafts: DraftCounts | None = None


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """One sample of a group. Owned by the controller until its group is delivered.

    Attributes:
        group_id: Group it belongs to.
        sample_index: Its place in the group, 0 … n-1.
        seed: Gumbel key; with the weights and the prompt it determines every token.
        prompt_token_ids: The prompt.
        token_ids: Generated tokens.
        logprobs: Log-probability of each generated token when it was sampled.
        loss_mask: 1 where the token is trained on (every generated token, here).
        weight_versions: Spans over `token_ids`, in order, without gaps.
        routed_experts: Where the experts of its tokens lie, one reference a chunk, in order; with gaps where a
            chunk's were not captured.
        finish_reason: Why generation ended, None while pending.
        status: See `Status`; change it with `move_to` only.
        reward: Score of the reward function; None until scored. Never a stand-in for a failure.
        error: Reason when failed.
        metadata: Statistics (shards, timings, verdict) and the prompt's metadata.
    """

    group_id: str
    sample_index: int
    seed: int
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    weight_versions: list[VersionSpan] = field(default_factory=list)
    routed_experts: tuple[RoutingRef, ...] = ()
    finish_reason: FinishReason | None = None
    status: Status = Status.PENDING
    reward: float | None = None
    error: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def trajectory_id(self) -> str:
        return f"{self.group_id}/{self.sample_index}"

    def move_to(self, status: Status) -> None:
        """Change the status. Raises ValueError on a transition that is not legal."""
        if status not in _LEGAL[self.status]:
            raise ValueError(
                f"{self.trajectory_id} status: got {self.status.value} → {status.value}, expected one "
                f"of {sorted(s.value for s in _LEGAL[self.status])}"
            )
        self.status = status

    def fail(self, reason: str) -> None:
        """Mark the trajectory failed with its reason; it carries no reward from then on."""
        self.move_to(Status.FAILED)
        self.reward, self.error = None, reason

    def append(self, result: ChunkResult) -> None:
        """Append a chunk's tokens, with their log-probabilities, mask, versions and routing."""
        base = len(self.token_ids)
        self.token_ids.extend(result.token_ids)
        self.logprobs.extend(result.logprobs)
        self.loss_mask.extend([1] * len(result.token_ids))
        for span in result.spans:
            append_span(
                self.weight_versions,
                VersionSpan(version=span.version, start=base + span.start, stop=base + span.stop),
            )
        if result.routing is not None and result.token_ids:
            self.routed_experts += (result.routing,)


@dataclass(slots=True, kw_only=True)
class Group:
    """The samples of one prompt: the unit of delivery to the trainer."""

    group_id: str
    prompt: Prompt
    trajectories: list[Trajectory]

    @property
    def is_finished(self) -> bool:
        return all(t.status is not Status.PENDING for t in self.trajectories)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Of a user's request, whose choices are requests of their own here: all of them are let in, or none.

    Attributes:
        ticket_id: The same for all of them, and for no other's.
        num_choices: How many they are.
    """

    ticket_id: str
    num_choices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """What a client submits: prompts, samples for each, sampling, and how they are scored.

    Attributes:
        prompts: At least one prompt.
        n_samples_per_prompt: Members of each group, ≥ 1.
        sampling: Sampling parameters of all of them.
        run_seed: With the group id and the sample index it determines every seed.
        group_ids: One identifier for each prompt, unique within the request; they enter the seed, so
            the same ids with the same run_seed give the same trajectories.
        reward: Name of a reward function ("none" leaves trajectories unscored).
        priority: Lower is served first.
        run_id: Names the run that these groups belong to. Under the same run and group ids a request that is made
            again, after whatever died, gets what is durable and goes on from there; None: never asked again.
        stream: Who follows the tokens of a request for one trajectory; None: nobody.
        max_wait_s: Refuse the request if it is expected to wait longer than this for an engine, or if it would be one
            more than keep the targets (see rollout.scheduler.admission); None: it may wait.
        ticket: With which other requests it is let in or refused; None: on its own.
        is_interactive: A user waits for it. Its prompts are not remembered: they tell nothing about later visits.
    """

    prompts: tuple[Prompt, ...]
    n_samples_per_prompt: int
    sampling: SamplingParams
    run_seed: int
    group_ids: tuple[str, ...]
    reward: str = "none"
    priority: int = 0
    run_id: str | None = None
    stream: TokenStream | None = None
    max_wait_s: float | None = None
    ticket: Ticket | None = None
    is_interactive: bool = False

    def __post_init__(self) -> None:
        if self.stream is not None and (len(self.prompts), self.n_samples_per_prompt) != (1, 1):
            got = f"{len(self.prompts)} prompts × {self.n_samples_per_prompt} samples"
            raise InvalidRequest("stream", got, "one trajectory")
        if self.run_id == "":
            raise InvalidRequest("run_id", "an empty string", "a name, or None")
        if not self.prompts:
            raise InvalidRequest("prompts", "an empty sequence", "at least one prompt")
        if self.n_samples_per_prompt < 1:
            raise InvalidRequest("n_samples_per_prompt", self.n_samples_per_prompt, "an integer ≥ 1")
        if len(self.group_ids) != len(self.prompts):
            raise InvalidRequest("group_ids", f"{len(self.group_ids)} ids", f"{len(self.prompts)}, one a prompt")
        if len(set(self.group_ids)) != len(self.group_ids):
            raise InvalidRequest("group_ids", "a repeated id", "ids unique within the request")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the serving model accepts; requests are checked against it before they are queued."""

    vocab_size: int
    max_model_len: int

    def check(self, prompt: Prompt, sampling: SamplingParams) -> None:
        """Raise InvalidRequest unless the prompt and its whole output fit the model."""
        ids = prompt.token_ids
        if not ids:
            raise InvalidRequest(f"prompt {prompt.prompt_id}", "no tokens", "at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = next(t for t in ids if not 0 <= t < self.vocab_size)
            raise InvalidRequest(f"prompt {prompt.prompt_id} token id", bad, f"an id in [0, {self.vocab_size})")
        if len(ids) + sampling.max_tokens > self.max_model_len:
            raise InvalidRequest(
                f"prompt {prompt.prompt_id} length",
                f"{len(ids)} prompt + {sampling.max_tokens} output tokens",
                f"at most max_model_len = {self.max_model_len} in total",
            )
