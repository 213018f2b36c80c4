"""What is to be served, and what is demanded of it.

Owns the three scenarios of the requirements and their targets. Knows nothing of hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from rollout.errors import InvalidRequest
from rollout.simulate.lengths import LengthModel

SAMPLED_GROUPS = 4000  # whose lengths give the means below; their standard error is about 1 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A stream of requests of one kind.

    Attributes:
        name: Of the scenario.
        prompt_tokens: Of every prompt.
        output_tokens: Most tokens of an output.
        mean_output: Mean tokens of an output.
        held_output: Mean tokens that a running sequence has generated so far, averaged over time. Longer sequences
            run longer, so it is E[L²] / 2 E[L] and not half of the mean.
        group_size: Requests that share a prompt, which is prefilled once for them.
        is_training: Whether new weights arrive while it runs, and routing is recorded.

    Raises:
        InvalidRequest: A size below 1, or means that no outputs could have.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    mean_output: float
    held_output: float
    group_size: int = 1
    is_training: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens", "mean_output", "group_size"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "at least 1")
        if self.mean_output > self.output_tokens:
            raise InvalidRequest("mean_output", self.mean_output, f"at most output_tokens = {self.output_tokens}")

    @property
    def held_tokens(self) -> float:
        """KV of a running sequence, averaged over time; a shared prompt counts for each, as reads do."""
        return self.prompt_tokens + self.held_output

    @property
    def prefilled_tokens(self) -> float:
        """Of the prompt, for each request, where a group's prompt is prefilled once."""
        return self.prompt_tokens / self.group_size


def fixed(name: str, prompt_tokens: int, output_tokens: int) -> Workload:
    """Requests that are all alike, as load tests send them."""
    return Workload(
        name=name,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        mean_output=output_tokens,
        held_output=output_tokens / 2,
    )


@cache
def long_tailed(name: str, prompt_tokens: int, output_tokens: int, group_size: int = 16) -> Workload:
    """RL rollouts: outputs of the lengths that rollout.simulate.lengths describes, cut at the limit."""
    lengths: np.ndarray = (
        LengthModel().draw(np.random.default_rng(0), SAMPLED_GROUPS, group_size, output_tokens).astype(float)
    )
    return Workload(
        name=name,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        mean_output=float(lengths.mean()),
        held_output=float((lengths**2).mean() / (2 * lengths.mean())),
        group_size=group_size,
        is_training=True,
    )


SCENARIOS = (
    fixed("serving", 4096, 1536),
    long_tailed("rl_20k", 2048, 20_480),
    long_tailed("rl_32k", 2048, 32_768),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the requirements demand.

    Attributes:
        ttft_s: Time to the first token that 95 % of the requests must keep.
        tpot_s: Mean time of an output token.
        memory_ratio: Weights and KV at equal load, of bfloat16's.
        throughput_ratio: Tokens per second, of the baseline's on the same GPUs.
    """

    ttft_s: float = 0.2
    tpot_s: float = 0.05
    memory_ratio: float = 0.6
    throughput_ratio: float = 2.0
