"""Generations that run beside a measurement, from a client of their own, until they are stopped.

Owns the thread that submits them. Counts what came back, so that a measurement can say that nothing was lost.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from actors.service import Service
from launch.workload import Workload
from rollout.errors import LongrollError
from rollout.types import SamplingParams, Status

NUM_PROMPTS = 8
NUM_SAMPLES = 4
RUN_SEED = 7


@dataclass(slots=True, kw_only=True)
class Returned:
    """Trajectories submitted and returned, by how they ended; spans of versions that their tokens name."""

    num_submitted: int = 0
    num_returned: int = 0
    num_failed: int = 0
    num_wrong_length: int = 0
    versions: set[int] = field(default_factory=set)
    error: str | None = None

    @property
    def num_lost(self) -> int:
        """Neither returned whole nor explained."""
        return self.num_submitted - self.num_returned + self.num_failed + self.num_wrong_length


class BackgroundLoad:
    """Keeps a service decoding; a context manager that waits for the last generation at its end.

    Args:
        service: What decodes.
        workload: Where prompts come from.
        max_tokens: Tokens of every generation (it does not stop earlier).
    """

    def __init__(self, service: Service, workload: Workload, max_tokens: int) -> None:
        self.returned = Returned()
        self._service, self._workload, self._max_tokens = service, workload, max_tokens
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longroll-load", daemon=True)

    def __enter__(self) -> BackgroundLoad:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_stopping.set()
        self._thread.join()

    def _run(self) -> None:
        client = self._service.client
        sampling = SamplingParams(max_tokens=self._max_tokens, ignore_eos=True)
        number = 0
        try:
            while not self._is_stopping.is_set():
                prompts = self._workload.batch(number * NUM_PROMPTS, NUM_PROMPTS)
                ids = [f"load{number:05d}/{i}" for i in range(NUM_PROMPTS)]
                handle = client.submit(prompts, NUM_SAMPLES, sampling, run_seed=RUN_SEED, group_ids=ids)
                self.returned.num_submitted += NUM_PROMPTS * NUM_SAMPLES
                for group in client.groups(handle):
                    for trajectory in group.trajectories:
                        self.returned.num_returned += 1
                        self.returned.num_failed += trajectory.status is Status.FAILED
                        self.returned.num_wrong_length += len(trajectory.token_ids) != self._max_tokens
                        self.returned.versions |= {span.version for span in trajectory.weight_versions}
                number += 1
        except LongrollError as error:
            self.returned.error = str(error)
