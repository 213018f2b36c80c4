"""Whom a fault campaign kills, in which order and how, and where these processes are.

Owns the plan, which a seed decides, and the search by process title below a driver. Knows nothing of recovery.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import psutil

from rollout.config import RunConfig


class Kind(str, Enum):
    """What is killed."""

    SHARD = "shard"
    ENGINE_CORE = "engine core"
    CONTROLLER = "controller"
    REWARD = "reward worker"
    TRAINER = "trainer rank"
    DRIVER = "whole service"


TITLES = {
    Kind.SHARD: "ray::Shard",
    Kind.ENGINE_CORE: "VLLM::EngineCore",
    Kind.CONTROLLER: "ray::Controller",
    Kind.REWARD: "ray::RewardWorker",
    Kind.TRAINER: "ray::TrainerRank",
}
"""How the titles of their processes begin; the driver is known by its id."""
SPAWNED = "multiprocessing.spawn"
"""In the command of an engine core that could not set its title, as one in some dozens cannot: a child of its shard."""
NEEDS_OPERATOR = frozenset({Kind.TRAINER, Kind.DRIVER})
"""Stopped, they are found and killed by whoever looks after the run; where the driver dies, it is started again."""


def numbers_of(config: RunConfig) -> dict[Kind, int]:
    """Processes of each kind in a run when all are there; a moment after a death there may be more.

    Reward workers start when they are needed: the first is always there.
    """
    num_shards = config.engine.num_all_shards
    return {
        Kind.SHARD: num_shards,
        Kind.ENGINE_CORE: num_shards,
        Kind.CONTROLLER: 1,
        Kind.REWARD: min(1, config.scheduler.num_reward_workers),
        Kind.TRAINER: config.trainer.num_ranks,
        Kind.DRIVER: 1,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One planned kill.

    Attributes:
        kind: Of the victim.
        signal: SIGKILL or SIGSTOP.
        delay_s: After the run was seen to go on.
        draw: In [0, 1): which of the processes of that kind.
    """

    kind: Kind
    signal: signal.Signals
    delay_s: float
    draw: float


def plan(seed: int, max_delay_s: float) -> Iterator[Strike]:
    """Kills without end: all kinds in a new order in each round, by one signal in one round and the other in the next.

    Args:
        seed: Decides everything.
        max_delay_s: Delays are uniform below it.
    """
    draw = random.Random(seed)
    last: dict[Kind, signal.Signals] = {}
    while True:
        kinds = list(Kind)
        draw.shuffle(kinds)
        for kind in kinds:
            chosen = draw.choice((signal.SIGKILL, signal.SIGSTOP))
            if kind in last:
                chosen = signal.SIGSTOP if last[kind] is signal.SIGKILL else signal.SIGKILL
            last[kind] = chosen
            delay_s = draw.uniform(0.0, max_delay_s)
            yield Strike(kind=kind, signal=chosen, delay_s=delay_s, draw=draw.random())


def family(driver: int) -> list[psutil.Process]:
    """Every process below a driver; empty if it is gone."""
    try:
        return psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def by_kind(driver: int) -> dict[Kind, list[psutil.Process]]:
    """Living processes of a run by kind, in the order of their titles; stopped ones are among them."""
    found: dict[Kind, list[tuple[str, int, psutil.Process]]] = {kind: [] for kind in Kind}
    for process in family(driver):
        with contextlib.suppress(psutil.Error, IndexError):
            title = process.cmdline()[0]
            kind = kind_of(process)
            if kind is not None and process.status() != psutil.STATUS_ZOMBIE:
                found[kind].append((title, process.pid, process))
    with contextlib.suppress(psutil.NoSuchProcess):
        found[Kind.DRIVER].append(("", driver, psutil.Process(driver)))
    return {kind: [process for _, _, process in sorted(some, key=lambda one: one[:2])] for kind, some in found.items()}


def kind_of(process: psutil.Process) -> Kind | None:
    """What a process below the driver is; None if it is nobody to be killed.

    Raises:
        psutil.Error, IndexError: It has ended.
    """
    command = process.cmdline()
    kind = next((kind for kind, start in TITLES.items() if command[0].startswith(start)), None)
    if kind is None and any(SPAWNED in word for word in command):
        parent = process.parent()
        if parent is not None and parent.cmdline()[0].startswith(TITLES[Kind.SHARD]):
            return Kind.ENGINE_CORE
    return kind


def is_worker(process: psutil.Process) -> bool:
    """Whether it is an engine's or an actor's process. Ray's own agents are neither; they take a minute to leave."""
    try:
        return kind_of(process) is not None or process.cmdline()[0].startswith("VLLM::")
    except (psutil.Error, IndexError):
        return False


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, whoever waits for it or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
