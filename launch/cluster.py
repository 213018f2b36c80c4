"""Joining or starting Ray, and where a run's files lie. Knows nothing of what runs on it."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import ray

from rollout.config import RunConfig
from rollout.errors import LongrollError
from rollout.journal.opening import SQLITE

JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job
QUIET = {
    "RAY_worker_niceness": "0",  # Ray lowers its workers' priority by 15; engines and trainers are the work itself
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def is_submitted_job() -> bool:
    """Whether this process is the driver of a Ray job, in a directory that Ray uploaded and may delete."""
    return JOB_MARK in os.environ


def start_ray(config: RunConfig) -> None:
    """Join the cluster of cluster.address or RAY_ADDRESS (set inside a job), or start one here.

    Raises:
        LongrollError: If there is no cluster at that address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    cluster = config.cluster
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address is not None and address != "local":
        try:
            ray.init(address=address, namespace=cluster.namespace, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise LongrollError(f"Ray cluster: got no answer at {address} ({error}), expected a running one") from error
        return
    wanted = (
        config.engine.num_all_shards * cluster.num_cpus_per_shard
        + config.trainer.num_ranks * cluster.num_cpus_per_trainer
    )
    ray.init(
        address="local",  # never an unrelated cluster that happens to run on this machine
        num_cpus=max(os.cpu_count() or 1, math.ceil(wanted) + 1),
        include_dashboard=cluster.dashboard,
        namespace=cluster.namespace,
        logging_level=logging.WARNING,
        log_to_driver=False,  # engines and ranks write to the session's log files; what fails is raised here
    )


def run_directory(path: str) -> Path:
    """Absolute directory of a run, made if needed.

    A relative path in a submitted job is taken from ~/longroll: Ray deletes the uploaded directory.
    """
    folder = Path(path).expanduser()
    if not folder.is_absolute() and is_submitted_job():
        folder = Path.home() / "longroll" / folder
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def absolute_dsn(dsn: str | None) -> str | None:
    """A journal's DSN with the absolute path of its file, whose directory is made; others as they are."""
    if dsn is None or not dsn.startswith(SQLITE):
        return dsn
    path = Path(dsn.removeprefix(SQLITE))
    return f"{SQLITE}{run_directory(str(path.parent)) / path.name}"


def model_path(path: str) -> str:
    """Absolute where every process shares this directory; left relative in a job, whose copy differs by node."""
    return path if is_submitted_job() or not Path(path).is_dir() else str(Path(path).resolve())
