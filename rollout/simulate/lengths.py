"""How long trajectories become: drawn from a heavy-tailed distribution, or read from a trace of real ones.

Owns the distribution and the trace's form. Knows nothing of time.

The length of a member is  exp(mu + sigma · (sqrt(rho) · g + sqrt(1 - rho) · e)) · p,  with g drawn once for its
group, e for itself, both standard normal, and p a Pareto variable for a share of the members and 1 for the
others; then cut at the limit. So sigma is the spread of log lengths, and rho the share of its square that siblings
have in common.

What is published, and what of it the defaults take:
- UloRL (arXiv 2507.19766, as summarised by its readers): four fifths of the samples end within half of the limit.
  The defaults do: 80 % of 32,768-token trajectories end below 16,384. The median follows from it.
- Seer (arXiv 2511.14617): siblings' lengths resemble each other, enough to schedule by; the last tenth of the
  trajectories takes up to half of a synchronous rollout. We found no figure of the correlation: rho = 0.6 is assumed.
- TLT (arXiv 2511.16665), RollPacker (2509.21009), APRIL (2509.18521): in every step the longest are far above the
  75th percentile. sigma = 0.9 puts the 99th at 8 medians before the limit; the Pareto part is assumed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from rollout.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWork:
    """A prompt and what its members will turn out to be, which no scheduler sees.

    Attributes:
        group_id: Unique in a workload.
        prompt_tokens: Tokens of the prompt.
        output_tokens: Length of each member.
    """

    group_id: str
    prompt_tokens: int
    output_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthModel:
    """Parameters of the distribution described in the module.

    Attributes:
        p80_share: 80th percentile of the log-normal part, as a share of the limit.
        sigma: Standard deviation of the logarithm.
        rho: Correlation of the logarithms of siblings.
        tail_share: Share of the members that the Pareto variable lengthens.
        tail_index: Its index; the smaller, the heavier.

    Raises:
        InvalidRequest: A value out of its range.
    """

    p80_share: float = 0.5
    sigma: float = 0.9
    rho: float = 0.6
    tail_share: float = 0.05
    tail_index: float = 1.5

    def __post_init__(self) -> None:
        for name, value, is_right, expected in (
            ("p80_share", self.p80_share, self.p80_share > 0, "above 0"),
            ("sigma", self.sigma, self.sigma >= 0, "at least 0"),
            ("rho", self.rho, 0 <= self.rho <= 1, "between 0 and 1"),
            ("tail_share", self.tail_share, 0 <= self.tail_share <= 1, "between 0 and 1"),
            ("tail_index", self.tail_index, self.tail_index > 0, "above 0"),
        ):
            if not is_right:
                raise InvalidRequest(name, value, expected)

    def draw(self, rng: np.random.Generator, num_groups: int, group_size: int, max_tokens: int) -> np.ndarray:
        """Lengths in tokens, int64 of shape (num_groups, group_size), between 1 and max_tokens."""
        mu = math.log(self.p80_share * max_tokens) - NormalDist().inv_cdf(0.8) * self.sigma
        group = rng.standard_normal((num_groups, 1)) * math.sqrt(self.rho)
        member = rng.standard_normal((num_groups, group_size)) * math.sqrt(1 - self.rho)
        pareto = 1 + rng.pareto(self.tail_index, (num_groups, group_size))
        is_tail = rng.random((num_groups, group_size)) < self.tail_share
        lengths = np.exp(mu + self.sigma * (group + member)) * np.where(is_tail, pareto, 1.0)
        return np.clip(lengths.round(), 1, max_tokens).astype(np.int64)


def draw_groups(
    model: LengthModel, rng: np.random.Generator, step: int, num_groups: int, group_size: int, prompt: int, limit: int
) -> Iterator[GroupWork]:
    """The groups of one training step; `prompt` and `limit` in tokens."""
    for i, row in enumerate(model.draw(rng, num_groups, group_size, limit)):
        yield GroupWork(group_id=f"{step}/{i}", prompt_tokens=prompt, output_tokens=tuple(int(n) for n in row))


def read_trace(path: Path) -> list[GroupWork]:
    """Read a JSONL trace: one member a line, with group_id, sample_index, prompt_tokens, output_tokens.

    Groups keep the order in which they first appear.

    Raises:
        InvalidRequest: No such file, a line of another form, a member twice, or an empty trace.
    """
    expected = "lines of JSON with group_id, sample_index, prompt_tokens and output_tokens >= 1"
    members: dict[str, dict[int, int]] = {}
    prompts: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InvalidRequest("trace", f"{path}: {error}", expected) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            group_id, index = str(row["group_id"]), int(row["sample_index"])
            prompt, output = int(row["prompt_tokens"]), int(row["output_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"trace {path}, line {number}", f"{line[:80]} ({error!r})", expected) from error
        group = members.setdefault(group_id, {})
        if index in group or output < 1 or prompt < 1:
            raise InvalidRequest(f"trace {path}, line {number}", line[:80], f"{expected}, every member once")
        group[index], prompts[group_id] = output, prompt
    if not members:
        raise InvalidRequest("trace", f"{path}: no lines", expected)
    return [
        GroupWork(group_id=g, prompt_tokens=prompts[g], output_tokens=tuple(outputs[i] for i in sorted(outputs)))
        for g, outputs in members.items()
    ]
