"""Sibling drafts between shards: small messages of what has been generated here, sent when a chunk ends.

Owns who the peers are and that one message to each is under way at most. What the messages hold is
`rollout.speculation.suffix`'s; lost ones cost drafts, never tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from ray.exceptions import RayError

from actors.vllm_plugin import GROUP_KEY, MEMBER_KEY, PROMPT_KEY
from rollout.errors import LongrollError
from rollout.types import Chunk

logger = logging.getLogger(__name__)


def kinship(chunk: Chunk) -> dict[str, Any]:
    """Entries of a request's extra_args that tell whose continuation it is.

    Trajectories of the same prompt tokens are siblings, at whatever visit of the prompt.
    """
    prompt = np.array(chunk.token_ids[: chunk.num_prompt_tokens], dtype=np.int32)
    return {
        GROUP_KEY: hashlib.blake2b(prompt.tobytes(), digest_size=16).hexdigest(),
        MEMBER_KEY: chunk.trajectory_id,
        PROMPT_KEY: chunk.num_prompt_tokens,
    }


class SiblingExchange:
    """One shard's end.

    Args:
        rank: Of the shard.
        workers: Calls a method of every worker, as Shard._workers does.
    """

    def __init__(self, rank: int, workers: Callable[..., Awaitable[list[Any]]]) -> None:
        self._rank, self._workers = rank, workers
        self._peers: dict[int, Any] = {}
        self._sending: asyncio.Task[None] | None = None

    def set_peers(self, shards: Sequence[Any]) -> None:
        """All shards in the order of their ranks, this one among them."""
        self._peers = {rank: shard for rank, shard in enumerate(shards) if rank != self._rank}

    def share(self) -> None:
        """Send what is new, unless that is under way already."""
        if self._peers and (self._sending is None or self._sending.done()):
            self._sending = asyncio.create_task(self._send())

    async def take(self, delta: Any) -> None:
        """Let another shard's trajectories draft for this one's."""
        await self._workers("sibling_apply", delta)

    async def _send(self) -> None:
        for rank, shard in self._peers.items():
            try:
                delta = (await self._workers("sibling_delta", str(rank)))[0]
                if delta:
                    shard.take_siblings.remote(delta)
            except (LongrollError, RayError, TimeoutError) as error:
                logger.warning("shard %d: could not share siblings with shard %d: %s", self._rank, rank, error)
