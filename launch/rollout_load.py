"""What the rollout bench asks for: groups of equal lengths, or of heavy-tailed ones that no scheduler sees.

Owns the choice of prompts and lengths; runs nothing. Lengths come from the distribution that the simulator draws from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rollout.simulate.lengths import LengthModel
from rollout.types import Prompt, RolloutRequest, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Groups that are asked for together.

    Attributes:
        request: All of them; group ids are those of the prompts and the number of the visit.
        lengths: At which every trajectory ends, by its id; without an entry at the sampling's max_tokens.
    """

    request: RolloutRequest
    lengths: dict[str, int]


def uniform_load(prompts: Sequence[Prompt], n: int, *, run_seed: int, num_tokens: int) -> Load:
    """Every member generates exactly `num_tokens` tokens."""
    return Load(request=_request(prompts, n, run_seed, num_tokens, 0), lengths={})


def heavy_loads(
    prompts: Sequence[Prompt], n: int, *, run_seed: int, model: LengthModel, max_tokens: int, visits: int
) -> list[Load]:
    """One load for each visit of the prompts, as in the epochs of a training run.

    Args:
        prompts: One a group.
        n: Members of each group.
        run_seed: Of the draw; each visit has seeds of its own.
        model: Of the lengths, between 1 and `max_tokens`. Visits of a prompt resemble each other as siblings do.
        max_tokens: Where generations are cut off.
        visits: At least 1.
    """
    drawn = model.draw(np.random.default_rng(run_seed), len(prompts), n * visits, max_tokens)
    loads = []
    for visit in range(visits):
        request = _request(prompts, n, run_seed, max_tokens, visit)
        pairs = zip(request.group_ids, drawn[:, visit * n : (visit + 1) * n], strict=True)
        lengths = {f"{group_id}/{i}": int(length) for group_id, row in pairs for i, length in enumerate(row)}
        loads.append(Load(request=request, lengths=lengths))
    return loads


def write_trace(load: Load, path: Path) -> None:
    """The lengths of a load as a trace for launch.simulate."""
    pairs = zip(load.request.group_ids, load.request.prompts, strict=True)
    prompts = {group_id: len(prompt.token_ids) for group_id, prompt in pairs}
    with path.open("w", encoding="utf-8") as file:
        for name, length in load.lengths.items():
            group_id, _, index = name.rpartition("/")
            row = {
                "group_id": group_id,
                "sample_index": int(index),
                "prompt_tokens": prompts[group_id],
                "output_tokens": length,
            }
            file.write(json.dumps(row) + "\n")


def _request(prompts: Sequence[Prompt], n: int, run_seed: int, max_tokens: int, visit: int) -> RolloutRequest:
    return RolloutRequest(
        prompts=tuple(prompts),
        n_samples_per_prompt=n,
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        run_seed=run_seed,
        group_ids=tuple(f"{prompt.prompt_id}@{visit}" for prompt in prompts),
    )
