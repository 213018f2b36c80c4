"""Generations that run beside a measurement, from clients of their own, until they are stopped.

Owns the threads that submit them. Counts what came back, so that a measurement can say that nothing was lost.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from actors.service import Service
from launch.workload import Workload
from rollout.client import RolloutClient
from rollout.errors import LongrollError
from rollout.types import SamplingParams, Status

NUM_LANES = 4
NUM_PROMPTS = 2  # of a lane at once
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

    Several lanes submit, each the next generations when its last ones are back. The first ones of lane i are i/n
    shorter, so the lanes end one after another: if all ended together, the engines would have nothing to decode
    until the next ones came, and a measurement would take that for a pause.

    Args:
        service: What decodes.
        workload: Where prompts come from.
        max_tokens: Tokens of every generation (it does not stop earlier) after a lane's first.
    """

    def __init__(self, service: Service, workload: Workload, max_tokens: int) -> None:
        self.returned = Returned()
        self._service, self._workload, self._max_tokens = service, workload, max_tokens
        self._is_stopping, self._counting = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"longroll-load-{lane}", daemon=True)
            for lane in range(NUM_LANES)
        ]

    def __enter__(self) -> BackgroundLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, lane: int) -> None:
        number, num_tokens = 0, self._max_tokens * (NUM_LANES - lane) // NUM_LANES
        client = self._service.client
        try:
            while not self._is_stopping.is_set():
                self._generate(client, lane, number, num_tokens)
                number, num_tokens = number + 1, self._max_tokens
        except LongrollError as error:
            self.returned.error = str(error)

    def _generate(self, client: RolloutClient, lane: int, number: int, num_tokens: int) -> None:
        prompts = self._workload.batch((number * NUM_LANES + lane) * NUM_PROMPTS, NUM_PROMPTS)
        ids = [f"load{lane}/{number:05d}/{i}" for i in range(NUM_PROMPTS)]
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        returned = self.returned
        handle = client.submit(prompts, NUM_SAMPLES, sampling, run_seed=RUN_SEED, group_ids=ids)
        with self._counting:
            returned.num_submitted += NUM_PROMPTS * NUM_SAMPLES
        for group in client.groups(handle):
            with self._counting:
                for trajectory in group.trajectories:
                    returned.num_returned += 1
                    returned.num_failed += trajectory.status is Status.FAILED
                    returned.num_wrong_length += len(trajectory.token_ids) != num_tokens
                    returned.versions |= {span.version for span in trajectory.weight_versions}
