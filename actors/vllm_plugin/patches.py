"""The two places where vLLM 0.32 offers no hook, and what is put there. Nothing else of vLLM is patched.

1. `vllm.v1.worker.dp_utils._run_ar`: before every forward, dummy ones too, the data-parallel ranks
   all-reduce a small tensor. It gets one more row, in which each rank says which weight version it is
   ready for; the minimum is the version that all of them run this forward under. Two more say how many
   requests and sampled rows a rank that speculates brings. No upstream issue asks for a hook here; delete
   when vLLM lets a worker add to that message.
2. `vllm.v1.engine.core.EngineCore._attach_weight_version`: labels outputs with the version that was set
   through a pause. A version that changes between two steps must come with the step's own output, so the
   scheduler's is taken (https://github.com/vllm-project/vllm/issues/54443: ambiguous version of a request
   over several versions). Delete when outputs carry the version of the forward that made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_dp_group
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker import dp_utils

from actors.vllm_plugin.draft_records import StepSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """What a worker contributes to the vote and does with its outcome.

    Attributes:
        vote: The version this rank is ready for.
        settle: Told the lowest vote of all ranks, before the forward.
    """

    vote: Callable[[], int]
    settle: Callable[[int], Any]


_ballot: Ballot | None = None
_announced = (0, 0)  # requests and sampled rows of this rank in the next forward; dummy ones have none
_sizes: list[StepSize] = []  # of every rank in the last forward that they agreed on


def set_ballot(ballot: Ballot | None) -> None:
    """Let this process's rank take part in votes from now on; None votes for nothing.

    All ranks of a group must do so before the first request, as a rank without a ballot votes 0.
    """
    global _ballot
    _ballot = ballot


def announce(sequences: int, rows: int) -> None:
    """Let the other ranks know how many requests and sampled rows this one has in its next forward."""
    global _announced
    _announced = sequences, rows


def size_of_peers(rank: int) -> StepSize:
    """What the other data-parallel ranks had in the forward that was last agreed on."""
    peers = [size for place, size in enumerate(_sizes) if place != rank]
    return StepSize(
        sequences=sum(size.sequences for size in peers),
        rows=sum(size.rows for size in peers),
        has_prefill=any(size.has_prefill for size in peers),
    )


def install() -> None:
    """Apply both; safe to call more than once."""
    dp_utils._run_ar = _coordinate_with_vote
    EngineCore._attach_weight_version = _attach_weight_version


def _coordinate_with_vote(
    should_ubatch: bool,
    orig_num_tokens_per_ubatch: int,
    padded_num_tokens_per_ubatch: int,
    cudagraph_mode: int,
    parallel_config: Any,
) -> torch.Tensor:
    """vLLM's exchange between data-parallel ranks (one column each); the vote and the step's size are its last rows."""
    global _announced
    device, group = dp_utils._get_device_and_group(parallel_config)
    size = parallel_config.data_parallel_size
    mine = (
        orig_num_tokens_per_ubatch,
        padded_num_tokens_per_ubatch,
        int(should_ubatch),
        cudagraph_mode,
        0 if _ballot is None else _ballot.vote(),
        *_announced,
    )
    _announced = (0, 0)
    exchange = getattr(get_dp_group().device_communicator, "exchange", None)  # of our CPU communicator, on one host
    if exchange is not None:
        said = exchange.gather_rows([torch.tensor([mine], dtype=torch.int32)], [1] * size)[0].T
    else:
        said = torch.zeros(len(mine), size, dtype=torch.int32)
        said[:, parallel_config.data_parallel_rank] = torch.tensor(mine, dtype=torch.int32)
        said = said.to(device)
        dist.all_reduce(said, group=group)
    _sizes[:] = [
        StepSize(sequences=sequences, rows=rows, has_prefill=sequences > 0 and tokens != rows)
        for tokens, _, _, _, _, sequences, rows in said.T.tolist()
    ]
    if _ballot is not None:
        _ballot.settle(int(said[4].min()))
    return said[:4]


def _attach_weight_version(core: EngineCore, outputs: dict[int, Any]) -> None:
    version = getattr(core.scheduler, "weight_version", None)
    label = core._weight_version if version is None else str(version)
    for output in outputs.values():
        output.weight_version = label
