"""Shards whose trajectories end at lengths drawn beforehand, which only the shards know.

As if the token at that place had been an end: the scheduler, its clients and the journal see a generation that stops by
itself. So lengths can follow a published distribution, and are the same for whoever schedules them. For benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from actors.shard import Shard
from rollout.types import Chunk, ChunkResult, FinishReason


class HiddenLengthShard(Shard):
    """Use `with_lengths`."""

    lengths: Mapping[str, int] = {}

    async def generate(self, chunk: Chunk) -> ChunkResult:
        """As Shard.generate, ending where the trajectory's length is reached; unknown ones end as ever."""
        length = self.lengths.get(chunk.trajectory_id.partition(":")[2])  # "<handle>:<trajectory id>"
        if length is None:
            return await super().generate(chunk)
        left = length - (len(chunk.token_ids) - chunk.num_prompt_tokens)
        result = await super().generate(replace(chunk, max_tokens=min(chunk.max_tokens, left)))
        if len(result.token_ids) < left:
            return result
        return replace(result, finish_reason=FinishReason.STOP)


def with_lengths(lengths: Mapping[str, int]) -> type:
    """A class of shards that end these trajectories, by id, after so many tokens."""
    return type("LengthShard", (HiddenLengthShard,), {"lengths": dict(lengths)})
