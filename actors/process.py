"""Ending a process of this cluster for certain, also one that is stopped and answers nobody."""

from __future__ import annotations

import contextlib
import logging
import os
import signal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollout.fleet import Place

logger = logging.getLogger(__name__)
TIMEOUT_S = 30.0


def place_of_this_process() -> Place:
    """Where this actor runs."""
    return Place(node_id=ray.get_runtime_context().get_node_id(), pid=os.getpid())


def kill_process(place: Place) -> None:
    """SIGKILL on whatever node it is; what it spawned dies with it. A node that is gone took it along."""
    if place.node_id == ray.get_runtime_context().get_node_id():
        _kill(place.pid)
        return
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    try:
        ray.get(ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(place.pid), timeout=TIMEOUT_S)
    except Exception as error:  # the node does not answer; its death is Ray's to declare
        logger.warning("process %d of node %s could not be killed: %s", place.pid, place.node_id, error)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
