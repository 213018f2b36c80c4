"""What is simulated: the fleet, the work of each training step, and what disturbs it.

Owns the options and their limits. The defaults are those of published runs: DAPO (arXiv 2503.14476) takes 512 prompts
with 16 samples a step, on 128 GPUs; Seer (arXiv 2511.14617) 400 to 800 prompts with 8 or 16 samples on 32 to 256
GPUs. Slots and step budget are those of conf/engine/ep8_int4.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout.errors import InvalidRequest

POLICIES = ("static", "partial", "divided")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One workload on one fleet.

    Attributes:
        gpus: Accelerators, one shard on each.
        shards_per_group: Shards of an expert-parallel group; they step together.
        prompts: Groups that a training step consumes.
        n_samples_per_prompt: Members of a group.
        prompt_tokens: Of every prompt.
        output_tokens: Most tokens of an output.
        chunk_tokens: Most tokens of a chunk, for the divided policy.
        rl_steps: Training steps.
        over_sampling: Groups begun, as a multiple of those consumed. The excess is cut when the step is complete, and
            goes on in the next one with its tokens. Only with max_staleness of at least 1, and never under static.
        max_staleness: Most versions between a trajectory's first token and its training. A step waits for those that
            would pass it. Static is always synchronous.
        max_running: Sequences that an engine admits at once.
        ahead: Chunks handed to an engine beyond these, which wait in it for a slot. Static hands it everything.
        kv_tokens: KV of a shard; None takes what the accelerator has room for.
        block_tokens: Tokens of a KV block.
        max_batched_tokens: Rows of an engine step.
        spec_accept_length: Mean tokens a sequence gains in a step with the longest chain of drafts; 1 without
            speculation.
        spec_draft_tokens: Drafts of that chain. In each step as many of them are verified as pay, for all sequences
            alike.
        spec_draft_s: Seconds of drafting each of them. The default reads Qwen3-235B's head and a layer of its width
            (1.4 GB) from an H200's memory, 0.4 ms at 80 % of the bandwidth, and launches them.
        turnaround_s: From a chunk's end to the start of the next one on an engine: journal, scheduler, network.
        sync_stall_s: Pause of the whole fleet between two steps, for new weights.
        failures_per_shard_day: Each takes a whole group of shards down.
        restart_s: Until they are back.
        seed: Of lengths and failures; equal for all policies.
    """

    gpus: int = 64
    shards_per_group: int = 8
    prompts: int = 512
    n_samples_per_prompt: int = 16
    prompt_tokens: int = 2048
    output_tokens: int = 32_768
    chunk_tokens: int = 2048
    rl_steps: int = 1
    over_sampling: float = 1.0
    max_staleness: int = 0
    max_running: int = 64
    ahead: int = 0
    kv_tokens: int | None = None
    block_tokens: int = 16
    max_batched_tokens: int = 2048
    spec_accept_length: float = 1.0
    spec_draft_tokens: int = 0
    spec_draft_s: float = 0.0005
    turnaround_s: float = 0.02
    sync_stall_s: float = 0.0
    failures_per_shard_day: float = 0.0
    restart_s: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gpus", "shards_per_group", "prompts", "n_samples_per_prompt", "prompt_tokens", "output_tokens"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("chunk_tokens", "rl_steps", "max_running", "block_tokens", "max_batched_tokens"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in (
            "turnaround_s",
            "spec_draft_s",
            "sync_stall_s",
            "failures_per_shard_day",
            "max_staleness",
            "ahead",
        ):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _check("failures_per_shard_day", self.failures_per_shard_day, self.failures_per_shard_day >= 0, "at least 0")
        _check("restart_s", self.restart_s, self.restart_s > 0, "above 0")
        divides = self.gpus % self.shards_per_group == 0
        _check("shards_per_group", self.shards_per_group, divides, f"a divisor of gpus={self.gpus}")
        _check("over_sampling", self.over_sampling, self.over_sampling >= 1, "at least 1")
        is_kept = self.over_sampling == 1 or self.max_staleness >= 1
        _check("over_sampling", self.over_sampling, is_kept, "1 where max_staleness=0: what is cut could not be kept")
        rows = 1 + self.spec_draft_tokens
        _check(
            "spec_accept_length",
            self.spec_accept_length,
            1 <= self.spec_accept_length <= rows,
            f"between 1 and 1 + spec_draft_tokens = {rows}",
        )
        is_enough = self.max_batched_tokens > self.max_running
        expected = f"above the {self.max_running} rows of a full batch, or nothing is ever prefilled"
        _check("max_batched_tokens", self.max_batched_tokens, is_enough, expected)
        if self.kv_tokens is not None:
            _check("kv_tokens", self.kv_tokens, self.kv_tokens >= self.longest, f"at least the longest, {self.longest}")

    @property
    def longest(self) -> int:
        """KV that one trajectory may need, in whole blocks, with a step's growth to spare."""
        tokens = self.prompt_tokens + self.output_tokens + self.spec_draft_tokens + 1
        return -(-tokens // self.block_tokens) * self.block_tokens

    @property
    def num_groups(self) -> int:
        """Expert-parallel groups."""
        return self.gpus // self.shards_per_group


def check_policies(names: tuple[str, ...]) -> None:
    """Raises InvalidRequest for an unknown or repeated policy, or none."""
    is_right = bool(names) and set(names) <= set(POLICIES) and len(set(names)) == len(names)
    _check("policies", ",".join(names), is_right, f"some of {','.join(POLICIES)}, each once")


def _check(name: str, value: object, is_right: bool, expected: str) -> None:
    if not is_right:
        raise InvalidRequest(name, value, expected)
