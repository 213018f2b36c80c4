"""A model-runner mix-in under which the weights change only between two forwards, on all ranks at once.

Owns the moment of the flip in a worker: the lock that a forward holds, the vote before it, and the
version that its output carries. What a flip does, and when one may happen, is the business of
`rollout.sync.participant` and of the weights it is given.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from actors.vllm_plugin.patches import Ballot, set_ballot
from actors.vllm_plugin.steps import Step

VERSION_ATTRIBUTE = "longroll_weight_version"  # on vLLM's ModelRunnerOutput: version of the forward that made it


MAX_STEPS_KEPT = 20_000  # about 2 MB


class Voter(Protocol):
    """What is used of rollout.sync.participant.Participant."""

    @property
    def live_version(self) -> int: ...

    def vote(self) -> int: ...

    def settle(self, agreed: int) -> bool: ...


class WeightGate:
    """Keeps forwards and flips apart. Everything that arms, disarms or flips must hold `lock`.

    Args:
        voter: Decides.
        is_alone: Whether this rank's forwards involve no other data-parallel rank; then it settles alone.
    """

    def __init__(self, voter: Voter, *, is_alone: bool) -> None:
        self.lock = threading.RLock()
        self._voter, self._is_alone = voter, is_alone
        self.num_votes = 0
        if not is_alone:
            set_ballot(Ballot(vote=voter.vote, settle=self._settle))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward, from before its vote until its kernels are queued."""
        with self.lock:
            if self._is_alone:
                self._settle(self._voter.vote())
            yield

    def _settle(self, agreed: int) -> None:
        self._voter.settle(agreed)
        self.num_votes += 1

    @property
    def version(self) -> int:
        return self._voter.live_version


class VersionedRunnerMixin:
    """Mix in before a vLLM V1 model runner. Set `gate` when the weights may begin to change."""

    gate: WeightGate | None = None
    _forward: tuple[int, int] | None = None  # vote and version of the forward under way

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps: deque[Step] = deque(maxlen=MAX_STEPS_KEPT)

    def take_steps(self) -> list[Step]:
        """Steps since the last call, oldest first; the newest `MAX_STEPS_KEPT` of them. From any thread."""
        return [self._steps.popleft() for _ in range(len(self._steps))]

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        if self.gate is None:
            return super().execute_model(*args, **kwargs)  # type: ignore[misc]
        with self.gate.forward():
            output = super().execute_model(*args, **kwargs)  # type: ignore[misc]
            self._forward = (self.gate.num_votes, self.gate.version)
            return output

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        if self.gate is None:
            return super()._dummy_run(*args, **kwargs)  # type: ignore[misc]
        with self.gate.forward():
            return super()._dummy_run(*args, **kwargs)  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        has_sampled = self.execute_model_state is not None  # type: ignore[attr-defined]
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        record = getattr(output, "_model_runner_output", output)  # asynchronous scheduling wraps it
        if has_sampled and record is not None and self._forward is not None:
            vote, version = self._forward
            setattr(record, VERSION_ATTRIBUTE, version)
            self._steps.append(
                Step(
                    vote=vote,
                    version=version,
                    ended_at=time.monotonic(),
                    num_requests=len(record.req_ids),
                    num_trees=len(getattr(self, "_verified_trees", ())),
                )
            )
        return output
