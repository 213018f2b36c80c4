"""A service behind the gateway without actors or engines: it speaks whatever text it is told to.

Method calls look like those of Ray's handles: `handle.method.remote(…)` gives an awaitable.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from actors.call_line import CALLS, CallServer
from actors.line import LineServer
from actors.token_line import TOKENS, TokenSender
from rollout.errors import QueueFull, UnknownHandle
from rollout.fleet import ServiceStats, ShardStats
from rollout.gateway.outbox import Outboxes
from rollout.streaming import ChunkEnd, FirstToken
from rollout.types import FinishReason, ModelLimits, RolloutRequest, Status, Trajectory

STEP_TOKENS = 3


class Remote:
    """What Ray's actor handle looks like to whoever calls it."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name):
        method = getattr(self._target, name)

        class Call:
            def remote(self, *arguments):
                return asyncio.ensure_future(method(*arguments))

        return Call()


class FakeShard:
    def __init__(self):
        self.outboxes = Outboxes(patience_s=60.0)
        self.lines = LineServer({TOKENS: TokenSender(self.outboxes)})

    async def line_address(self):
        return await self.lines.open("127.0.0.1")


@dataclass
class FakeController:
    """Answers every completion with the tokens of `answer`, some at a time, then with the end token.

    Attributes:
        answer: Token ids that every prompt is continued with.
        is_full: Refuse everything.
        hold: Wait for this before the last tokens.
        late: Wait for this before the record.
    """

    answer: list[int]
    stop_token: int = 2
    vocab_size: int = 512
    max_model_len: int = 256
    is_full: bool = False
    hold: asyncio.Event | None = None
    late: asyncio.Event | None = None
    shard: FakeShard = field(default_factory=FakeShard)
    requests: list[RolloutRequest] = field(default_factory=list)
    aborted: dict[str, asyncio.Event] = field(default_factory=dict)
    first_tokens: list[FirstToken] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self):
        self.lines = LineServer({CALLS: CallServer({"complete": self.complete, "abort": self.abort})})

    async def line_address(self):
        return await self.lines.open("127.0.0.1")

    async def limits(self):
        return ModelLimits(vocab_size=self.vocab_size, max_model_len=self.max_model_len)

    async def live_version(self):
        return 7

    async def note_first_tokens(self, seen):
        self.first_tokens += seen

    async def live_shards(self):
        return {0: Remote(self.shard)}

    async def stats(self):
        shard = ShardStats(
            rank=0, version=7, num_running=1, num_waiting=0, kv_usage=0.5, num_tokens_generated=3, num_preemptions=0
        )
        stats = ServiceStats(live_version=7, num_queued=0, num_running=1, num_finished=2, num_aborted=0)
        return replace(stats, num_failed={"stale": 1}, shards=(shard,))

    async def abort(self, handle_id):
        if handle_id not in self.aborted:
            raise UnknownHandle(handle_id)
        self.aborted[handle_id].set()

    async def complete(self, request, client_id, handle_id):
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        if self.is_full:
            raise QueueFull("full", retry_after_s=2.5)
        gone = self.aborted[handle_id] = asyncio.Event()
        tokens = [*self.answer, self.stop_token][: request.sampling.max_tokens]
        reason = FinishReason.LENGTH if tokens[-1] != self.stop_token else FinishReason.STOP
        sent = 0
        while sent < len(tokens) and not gone.is_set():
            self._send(request, tokens, sent, reason)
            sent += STEP_TOKENS
            await asyncio.sleep(0.001)
            if self.hold is not None and sent + STEP_TOKENS >= len(tokens):
                await self.hold.wait()
        if self.late is not None:
            await self.late.wait()
        status = Status.COMPLETED if reason is FinishReason.STOP else Status.TRUNCATED
        return Trajectory(
            group_id=request.group_ids[0],
            sample_index=0,
            seed=0,
            prompt_token_ids=request.prompts[0].token_ids,
            token_ids=tokens[:sent] if gone.is_set() else tokens,
            logprobs=[-0.5] * min(sent, len(tokens)),
            finish_reason=FinishReason.ABORT if gone.is_set() else reason,
            status=Status.ABORTED if gone.is_set() else status,
            metadata={"num_cached_tokens": 1},
        )

    def _send(self, request, tokens, start, reason):
        stream = request.stream
        if stream is None:
            return
        some = tokens[start : start + STEP_TOKENS]
        prompt = request.prompts[0].token_ids
        scores_prompt = start == 0 and stream.num_prompt_logprobs is not None
        is_last = start + STEP_TOKENS >= len(tokens)
        self.shard.outboxes.of(stream.subscriber).put(
            stream.stream_id,
            start,
            some,
            [-0.5] * len(some),
            [((token, -0.5), (5, -1.5)) for token in some] if stream.num_top_logprobs else (),
            (None, *(((token, -2.0), (token, -2.0)) for token in prompt[1:])) if scores_prompt else (),
            ChunkEnd(is_stopped=reason is FinishReason.STOP, num_cached_tokens=1) if is_last else None,
        )
