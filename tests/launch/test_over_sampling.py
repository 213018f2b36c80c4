"""Over-sampling through launch.train's own steps: what is given up keeps its tokens, and goes on in the next step.

The client is the scheduler and a real journal in this process; only the engine is made up, and its tokens are known.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from pathlib import Path

import pytest

from actors.journal_keeper import JournalKeeper
from launch.train import after_step, ask_for, rollout
from rollout.config import JournalConfig, RunConfig, SchedulerConfig
from rollout.cursor import Cursor
from rollout.scheduler.jobs import ShardCapacity
from rollout.scheduler.records import Dispatch
from rollout.scheduler.scheduler import Scheduler
from rollout.trainer_config import TrainerConfig
from rollout.types import ChunkResult, FinishReason, Group, ModelLimits, Prompt, RolloutRequest, Status, VersionSpan

LONGEST = 24
NUM_SAMPLES = 2


def token_of(seed: int, position: int) -> int:
    return 10 + (seed + 7 * position) % 80


def length_of(problem: int) -> int:
    """Every third problem is long, so that it is given up at first."""
    return LONGEST if problem % 3 == 0 else 3 + problem % 4


class Problems:
    """The workload: a prompt names its problem."""

    def problem(self, number: int) -> Prompt:
        return Prompt(token_ids=(1, number), prompt_id=f"problem {number}")


class Unseen:
    """The monitor, of which a rollout needs one thing."""

    def track(self, groups, what, num_expected):
        return groups


class Client:
    """What launch.train asks of RolloutClient, with the service in place; one chunk comes back at a time."""

    def __init__(self, directory: Path) -> None:
        config = JournalConfig(dsn=f"sqlite:///{directory}/journal.db", synchronous="normal", group_commit_ms=0)
        self._loop = asyncio.new_event_loop()
        self._keeper = JournalKeeper(config)
        shards = {rank: ShardCapacity(max_running=3, kv_tokens=4096) for rank in range(2)}
        self._scheduler = Scheduler(
            SchedulerConfig(chunk_tokens=4), ModelLimits(vocab_size=100, max_model_len=64), shards
        )
        self._running: dict[str, Dispatch] = {}
        self._finished: deque[Group] = deque()
        self._waiting: dict[str, int] = {}
        self.generated: Counter[tuple[int, int]] = Counter()  # by seed and position

    def submit(self, prompts, n_samples, sampling, *, run_seed, group_ids, reward, run_id) -> str:
        request = RolloutRequest(
            prompts=tuple(prompts),
            n_samples_per_prompt=n_samples,
            sampling=sampling,
            run_seed=run_seed,
            group_ids=tuple(group_ids),
            reward="none",
            run_id=run_id,
        )
        handle = f"h{group_ids[-1]}"
        known = self._loop.run_until_complete(self._keeper.submit(request, handle))
        self._scheduler.submit(handle, request, 0.0, known)
        self._waiting[handle] = len(prompts)
        return handle

    def groups(self, handle: str):
        while self._waiting[handle]:
            if self._finished:
                self._waiting[handle] -= 1
                yield self._finished.popleft()
                continue
            for dispatch in self._scheduler.next_dispatches(0.0):
                self._running[dispatch.chunk.trajectory_id] = dispatch
            if self._running:
                self._return(next(iter(self._running)), is_cut=False)
            for finished in self._scheduler.book.take_finished():
                self._loop.run_until_complete(self._keeper.finish(finished))
                self._finished.append(finished.group)

    def abort(self, handle: str) -> None:
        for flights in self._scheduler.abort(handle, 0.0).values():
            for flight in flights:
                self._return(flight, is_cut=True)

    def acknowledge(self, run_id: str, group_ids: list[str], checkpoint: str) -> int:
        return self._loop.run_until_complete(self._keeper.acknowledge(run_id, group_ids, checkpoint))

    def close(self) -> None:
        self._loop.run_until_complete(self._keeper.close())
        self._loop.close()

    def _return(self, flight: str, *, is_cut: bool) -> None:
        """A chunk comes back, whole or cut after two tokens."""
        dispatch = self._running.pop(flight)
        chunk = dispatch.chunk
        start = len(chunk.token_ids) - chunk.num_prompt_tokens
        left = length_of(chunk.token_ids[1]) - start
        num = min(chunk.max_tokens, left, 2 if is_cut else left)
        self.generated.update((chunk.seed, start + i) for i in range(num))
        reason = FinishReason.STOP if num == left else FinishReason.ABORT if is_cut else FinishReason.LENGTH
        result = ChunkResult(
            trajectory_id=flight,
            token_ids=tuple(token_of(chunk.seed, start + i) for i in range(num)),
            logprobs=(-0.5,) * num,
            spans=(VersionSpan(version=0, start=0, stop=num),),
            finish_reason=reason,
            shard=dispatch.shard,
        )
        landing = self._scheduler.land(result, 0.0)
        if landing is not None:
            self._loop.run_until_complete(self._keeper.append(landing))
            self._scheduler.landed(flight, 0.0)


@pytest.fixture
def client(tmp_path):
    client = Client(tmp_path)
    yield client
    client.close()


def test_what_a_step_gives_up_goes_on_in_the_next_with_its_tokens(client):
    config = RunConfig(trainer=TrainerConfig(prompts_per_step=2, over_sampling_batch_size=4))
    config.sampling.n_samples_per_prompt, config.sampling.max_tokens = NUM_SAMPLES, LONGEST
    cursor, learned, num_given_up = Cursor(step=0, version=0, data_cursor=0), {}, 0
    for step in range(1, 7):
        asked = ask_for(config, step, cursor)
        before = sum(client.generated.values())
        groups = rollout(config, client, Problems(), asked, "run", Unseen())
        assert len(groups) == config.trainer.prompts_per_step
        assert sum(client.generated.values()) > before
        learned |= {group.group_id: group for group in groups}
        assert client.acknowledge("run", [group.group_id for group in groups], f"step {step}") == len(groups)
        cursor = after_step(cursor, asked, groups, step, [])
        num_given_up += len(cursor.leftover)
    assert num_given_up > 0 and len(learned) == 12, "every step gives something up, and learns from groups of its own"
    assert any(group.prompt.token_ids[1] % 3 == 0 for group in learned.values()), "a long one came back"
    assert set(client.generated.values()) == {1}, "no token was generated twice"
    for group in learned.values():
        for one in group.trajectories:
            length = length_of(group.prompt.token_ids[1])
            assert one.status is Status.COMPLETED
            assert list(one.token_ids) == [token_of(one.seed, position) for position in range(length)]
            assert len(one.logprobs) == length
