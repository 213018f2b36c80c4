"""The engines and the weights that a replay needs. A part of launch.replay.

Owns where a run's configuration and checkpoints are found. Weights of a later version come from the trainer's own
checkpoint: its ranks are started, load it, and publish it as in training.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.service import Service, start_service
from actors.trainer_group import TrainerGroup
from launch.cluster import model_path
from launch.compose import compose, model_directory
from launch.near_ties import near_tie
from launch.replay_pieces import Generate, PieceResult, Recorded, Verdict, pieces, replay_piece, verdict_of
from rollout.checkpoints import CURSOR_FILE, MARKER, CheckpointDir
from rollout.config import RunConfig
from rollout.cursor import Cursor
from rollout.errors import InvalidRequest
from rollout.journal.opening import SQLITE
from rollout.journal.records import TrajectoryRecord
from rollout.types import Chunk, ChunkResult

CHUNKS_PER_SHARD = 4  # pieces side by side: each holds the KV of all tokens before it


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """A run as it can be set up again.

    Attributes:
        config: Its configuration.
        run_dir: Where its checkpoints lie; None if that is not known.
    """

    config: RunConfig
    run_dir: Path | None

    @property
    def checkpoints(self) -> CheckpointDir | None:
        if self.run_dir is None:
            return None
        return CheckpointDir(self.run_dir / "checkpoints", self.config.trainer.num_ranks)

    def has(self, version: int) -> bool:
        """Whether the weights of a version can be had."""
        if version == 0:
            return True
        checkpoints = self.checkpoints
        return checkpoints is not None and (checkpoints.path(version) / CURSOR_FILE).is_file()


def stored_run(dsn: str, overrides: Sequence[str]) -> StoredRun:
    """The run whose journal this is.

    Args:
        dsn: Of the journal; config.yaml beside its file is the run's configuration, unless there are overrides.
        overrides: As for launch.train; run_dir says where the checkpoints are.

    Raises:
        InvalidRequest: There is neither, or the configuration or its model directory is wrong.
    """
    folder = Path(dsn.removeprefix(SQLITE)).expanduser().resolve().parent if dsn.startswith(SQLITE) else None
    if overrides:
        config = compose(overrides)
        run_dir = Path(config.run_dir) if any(one.startswith("run_dir=") for one in overrides) else folder
    elif folder is not None and (folder / "config.yaml").is_file():
        config, run_dir = read_config(folder / "config.yaml"), folder
    else:
        where = "overrides" if folder is None else f"overrides, or a config.yaml in {folder}"
        raise InvalidRequest("the run's configuration", "none", f"{where} (experiment=… run_dir=…)")
    model_directory(config.model.path)
    config.model.path = model_path(config.model.path)
    config.cluster.namespace += "-replay"  # the run itself may still be there
    return StoredRun(config=config, run_dir=run_dir)


def read_config(path: Path) -> RunConfig:
    """A configuration as launch.train wrote it. Raises InvalidRequest."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise InvalidRequest(
            str(path), str(error).splitlines()[0], "the configuration of a run of this version"
        ) from None
    assert isinstance(config, RunConfig)
    first, second = config.trainer.betas
    config.trainer.betas = (first, second)  # OmegaConf keeps sequences as lists
    return config


def replay(stored: StoredRun, record: TrajectoryRecord, piece_tokens: int) -> Verdict:
    """Start the engines and generate the trajectory again, version by version. Ray must be there."""
    config, trajectory = stored.config, record.restored.to_trajectory()
    spans = trajectory.weight_versions
    missing = sorted({span.version for span in spans if not stored.has(span.version)})
    results: list[PieceResult] = []
    if len(missing) == len({span.version for span in spans}):
        return verdict_of(len(trajectory.token_ids), results, missing)
    parts = config.model, config.engine, config.scheduler, config.sync, config.cluster
    with start_service(*parts) as service, ExitStack() as stack:
        weights = Weights(stored, service, stack)
        recorded = Recorded(
            trajectory=trajectory,
            sampling=record.sampling,
            vocab_size=service.infos[0].vocab_size,
            within=near_tie(config.engine.dtype or config.model.dtype, record.sampling.temperature),
        )
        for span in spans:
            if span.version not in missing:
                weights.serve(span.version)
                results += _replay_span(service, recorded, pieces(span.start, span.stop, piece_tokens))
    return verdict_of(len(trajectory.token_ids), results, missing)


def _replay_span(service: Service, recorded: Recorded, parts: Sequence[tuple[int, int]]) -> list[PieceResult]:
    """Pieces side by side, dealt to the shards in turn."""
    shards = itertools.cycle(service.shards)
    with ThreadPoolExecutor(max_workers=CHUNKS_PER_SHARD * len(service.shards)) as threads:
        waiting = [threads.submit(replay_piece, _generate_on(next(shards)), recorded, *part) for part in parts]
        return [one.result() for one in waiting]


def _generate_on(shard: Any) -> Generate:
    def generate(chunk: Chunk) -> ChunkResult:
        result: ChunkResult = ray.get(shard.generate.remote(chunk))
        return result

    return generate


class Weights:
    """Brings the engines to the versions of a run, in ascending order. Owns the trainer that loads checkpoints.

    Args:
        stored: The run.
        service: Its engines, which serve version 0.
        stack: Ends the trainer, if one was needed.
    """

    def __init__(self, stored: StoredRun, service: Service, stack: ExitStack) -> None:
        self._stored, self._service, self._stack = stored, service, stack
        self._live = 0
        self._trainers: TrainerGroup | None = None
        self._draft: Path | None = None

    def serve(self, version: int) -> None:
        """Publish a saved version.

        Raises:
            CheckpointBroken: It is damaged.
        """
        if version == self._live:
            return
        if self._trainers is None:
            self._draft = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="longroll-replay-")))
            (self._draft / "checkpoints").mkdir()
            self._trainers = self._stack.enter_context(_trainers(self._stored, self._draft, self._service))
        assert self._draft is not None and self._stored.checkpoints is not None, "asked of a saved version"
        saved, root = self._stored.checkpoints.path(version), self._draft / "checkpoints"
        (root / saved.name).symlink_to(saved.resolve())  # the run's own marker names its newest, and stays as it is
        (root / MARKER).write_text(saved.name + "\n")
        cursor = self._trainers.load_latest()
        assert cursor is not None and isinstance(cursor, Cursor), "the marker names it"
        self._trainers.publish()
        self._live = version


@contextmanager
def _trainers(stored: StoredRun, run_dir: Path, service: Service) -> Iterator[TrainerGroup]:
    config = stored.config
    group = TrainerGroup.start(
        config.model,
        replace(config.trainer),
        config.sampling,
        config.sync,
        config.cluster,
        run_dir,
        service.controller,
        config.engine,
    )
    try:
        yield group
    finally:
        group.stop()
