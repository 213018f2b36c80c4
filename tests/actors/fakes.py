"""A scripted shard and reward functions, importable by worker processes.

The first token of a prompt says what the shard does with it.
"""

from __future__ import annotations

import asyncio
import os
import time

import torch

from actors.service import served_plans
from rollout.errors import EngineDead
from rollout.fleet import Pace, Rendezvous, ShardInfo, ShardStats
from rollout.rewards import Score
from rollout.sync import segments
from rollout.sync.participant import Participant
from rollout.sync.shadow import Shadow
from rollout.types import ChunkResult, FinishReason, VersionSpan

ANSWER, HOLD, RAISE, DIE, MALFORMED = 1, 2, 3, 4, 5
VOCAB_SIZE, MAX_MODEL_LEN = 50, 64


class ShadowStore:
    """A participant's store without live weights: the shadow alone."""

    def __init__(self, plans, version):
        rows = {name: torch.zeros(plan.num_rows, plan.row_bytes, dtype=torch.uint8) for name, plan in plans.items()}
        self.shadow = Shadow(plans, rows, version)

    def begin(self, base):
        self.shadow.begin(base)

    def stage(self, ref, payload):
        self.shadow.stage(ref, payload)

    def missing(self):
        return self.shadow.missing()

    def digest(self):
        return self.shadow.common_digest(self.shadow.names)

    def prepare(self):
        pass

    def flip(self, version):
        self.shadow.commit(version)

    def undo(self):
        self.shadow.drop()


class FakeShard:
    """Records the order of events and answers without a model."""

    def __init__(self, rank, model, engine, sync, initial_version=0):
        self.rank, self.version = rank, initial_version
        self.events = []
        self.held = {}
        self.num_asked = 0
        self.mode = engine.vllm.get("fake", "ok")
        self.participant = Participant(ShadowStore(served_plans(model, engine), initial_version), initial_version)

    def rendezvous(self):
        return Rendezvous(host="127.0.0.1", rpc_port=1)

    async def start(self, rendezvous):
        if self.mode == "broken":
            raise EngineDead(f"shard {self.rank} could not start: no memory")
        return ShardInfo(
            rank=self.rank,
            group=self.rank,  # each on its own: one may die alone
            num_experts=8,
            num_local_experts=4,
            kv_tokens=1000,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
        )

    async def generate(self, chunk):
        kind = chunk.token_ids[0]
        self.events.append("generate")
        if kind == RAISE:
            raise RuntimeError("this request is cursed")
        if kind == DIE and self.rank == 0:
            os._exit(1)
        num, reason = chunk.max_tokens, FinishReason.LENGTH
        if kind == HOLD:
            future = self.held[chunk.trajectory_id] = asyncio.get_running_loop().create_future()
            if not await future:
                num, reason = 1, FinishReason.ABORT
        start = len(chunk.token_ids)
        return ChunkResult(
            trajectory_id=chunk.trajectory_id,
            token_ids=tuple(i % VOCAB_SIZE for i in range(start, start + num)),
            logprobs=(-0.5,) * (0 if kind == MALFORMED else num),
            spans=(VersionSpan(version=self.version, start=0, stop=num),),
            finish_reason=reason,
            shard=self.rank,
        )

    async def abort(self, trajectory_ids):
        self.events.append("abort")
        for trajectory_id in trajectory_ids:
            self._end(trajectory_id, False)

    async def begin(self, attempt, version, base):
        self.events.append("begin")
        self.participant.begin(attempt, version, base)

    async def stage(self, ref, payload=None):
        self.events.append("stage")
        self.participant.stage(ref, segments.map(ref) if payload is None else torch.from_numpy(payload))

    async def verify(self, attempt):
        self.events.append("verify")
        return self.participant.verify(attempt)

    async def arm(self, attempt):
        self.events.append("arm")
        self.participant.arm(attempt)

    async def flip(self, attempt):
        self.version = self.participant.flip(attempt)
        self.events.append(f"flip {self.version}")
        return self.version

    async def drop(self, attempt):
        self.events.append("drop")
        return self.participant.drop(attempt)

    async def live_version(self):
        return self.participant.live_version

    async def pause(self, mode):
        self.events.append(f"pause {mode.value}")
        if mode.value == "abort":
            for trajectory_id in list(self.held):
                self._end(trajectory_id, False)
            await asyncio.sleep(0.2)  # time in which a controller with an open gate would dispatch again

    async def resume(self):
        self.events.append("resume")

    async def stats(self):
        return ShardStats(
            rank=self.rank,
            version=self.version,
            num_running=len(self.held),
            num_waiting=0,
            kv_usage=0.0,
            num_tokens_generated=0,
            num_preemptions=0,
        )

    async def pace(self):
        """Its engine goes on, whatever it holds."""
        self.num_asked += 1
        return Pace(num_steps=self.num_asked)

    async def set_peers(self, shards):
        self.num_peers = len(shards)

    async def take_speculation(self):
        return None

    async def release(self):
        for trajectory_id in list(self.held):
            self._end(trajectory_id, True)

    async def take_events(self):
        events, self.events = self.events, []
        return events

    async def shutdown(self):
        pass

    def _end(self, trajectory_id, is_complete):
        future = self.held.pop(trajectory_id, None)
        if future is not None and not future.done():
            future.set_result(is_complete)


def words(prompt, token_ids, text):
    return Score(reward=float(len(text.split())), extras={"num_tokens": float(len(token_ids))})


def boom(prompt, token_ids, text):
    raise KeyError("no such answer")


def not_a_number(prompt, token_ids, text):
    return Score(reward=float("nan"))


def hang_if_told(prompt, token_ids, text):
    if prompt.metadata.get("hang"):
        time.sleep(3600)
    return Score(reward=1.0)


def die(prompt, token_ids, text):
    os._exit(1)
