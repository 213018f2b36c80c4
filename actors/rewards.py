"""Reward workers: one process each, with a hard time limit.

Owns the worker processes: a worker that hangs is killed and replaced. Knows nothing of groups,
queues or engines, and leaves the meaning of a reward to `rollout.rewards`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rollout.config import ModelConfig
from rollout.errors import InvalidRequest, LongrollError, RewardFailed
from rollout.rewards import RewardFunction, Score, resolve_reward, score_completion
from rollout.types import Prompt

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0  # a new process: interpreter, tokenizer, and the reward function's own imports
MAX_TRIES = 2  # of one score: a process that died or hung may have done so for a reason of its own


class RewardTimeout(RewardFailed):
    """A reward function ran longer than it may; its process was killed."""


class RewardProcessDied(RewardFailed):
    """The process of a reward function is gone."""


class RewardWorker:
    """Decodes and scores completions, one at a time.

    Args:
        model: Whose tokenizer decodes.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._decode = _load_decoder(model)
        self._functions: dict[str, RewardFunction] = {}

    def load(self, name: str) -> None:
        """Import a reward function. Raises InvalidRequest if there is none of that name."""
        function = resolve_reward(name)
        if function is not None:
            self._functions[name] = function

    def score(self, name: str, prompt: Prompt, token_ids: tuple[int, ...]) -> Score:
        """Score a completion with a function that was loaded. Raises RewardFailed."""
        try:
            text = self._decode(list(token_ids))
        except Exception as error:  # a tokenizer may raise anything on ids it does not know
            raise RewardFailed(f"decoding: {type(error).__name__}: {error}") from error
        return score_completion(self._functions[name], prompt, token_ids, text)


class _Slot:
    """A place in the pool and the process that fills it, if one does."""

    def __init__(self) -> None:
        self.worker: Any = None
        self.loaded: set[str] = set()


class RewardPool:
    """Runs scores on a fixed number of worker processes. Lives in one event loop.

    Args:
        model: Whose tokenizer decodes completions.
        num_workers: Processes.
        timeout_s: Time limit of one score, process start and imports not counted.
    """

    def __init__(self, model: ModelConfig, num_workers: int, timeout_s: float) -> None:
        self._model, self._timeout_s = model, timeout_s
        self._slots = [_Slot() for _ in range(num_workers)]
        self._idle: asyncio.LifoQueue[_Slot] = asyncio.LifoQueue()  # a warm process before a cold one
        for slot in reversed(self._slots):
            self._idle.put_nowait(slot)
        self._known = {"none"}

    async def check(self, name: str) -> None:
        """Make sure that a reward function exists. Raises InvalidRequest."""
        if name in self._known:
            return
        slot = await self._idle.get()
        try:
            await self._prepare(slot, name)
        finally:
            self._idle.put_nowait(slot)
        self._known.add(name)

    async def score(self, name: str, prompt: Prompt, token_ids: tuple[int, ...]) -> Score:
        """Score one completion; waits for a free process first. A process that dies or hangs gets a successor.

        Raises:
            RewardTimeout: It took too long, MAX_TRIES times.
            RewardFailed: It raised, returned no finite number, or its process died, MAX_TRIES times.
        """
        for _ in range(MAX_TRIES - 1):
            with contextlib.suppress(RewardTimeout, RewardProcessDied):
                return await self._score_once(name, prompt, token_ids)
            logger.warning("a reward worker died or hung over a score, which is tried again")
        return await self._score_once(name, prompt, token_ids)

    async def _score_once(self, name: str, prompt: Prompt, token_ids: tuple[int, ...]) -> Score:
        slot = await self._idle.get()
        try:
            await self._prepare(slot, name)
            return await self._call(slot, slot.worker.score.remote(name, prompt, token_ids), self._timeout_s)
        except RewardFailed:
            raise
        except LongrollError as error:
            raise RewardFailed(f"reward worker: {error}") from error
        finally:
            self._idle.put_nowait(slot)

    def stop(self) -> None:
        for slot in self._slots:
            self._discard(slot)

    async def _prepare(self, slot: _Slot, name: str) -> None:
        if slot.worker is None:
            slot.worker = ray.remote(RewardWorker).options(num_cpus=0, max_restarts=0).remote(self._model)
        if name not in slot.loaded:
            await self._call(slot, slot.worker.load.remote(name), START_TIMEOUT_S)
            slot.loaded.add(name)

    async def _call(self, slot: _Slot, reference: Any, timeout_s: float) -> Any:
        """Await a worker's answer; a process that hangs or has died is discarded."""
        try:
            return await asyncio.wait_for(reference, timeout_s)
        except TimeoutError:
            self._discard(slot)
            raise RewardTimeout(f"timed out after {timeout_s:g} s") from None
        except asyncio.CancelledError:
            self._discard(slot)  # it is busy with an answer that nobody awaits
            raise
        except RayActorError as error:
            self._discard(slot)
            raise RewardProcessDied(f"reward process died: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, (RewardFailed, InvalidRequest)):
                raise error.cause from None
            raise RewardFailed(f"{type(error.cause).__name__}: {error.cause}") from error

    def _discard(self, slot: _Slot) -> None:
        if slot.worker is not None:
            ray.kill(slot.worker)
        slot.worker, slot.loaded = None, set()


def _load_decoder(model: ModelConfig) -> Any:
    """A function from token ids to text that keeps special tokens, as verifiers look for tags."""
    file = Path(model.path) / "tokenizer.json"
    if file.is_file():  # much quicker to load than transformers
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    return lambda ids: slow.decode(ids, skip_special_tokens=False)
