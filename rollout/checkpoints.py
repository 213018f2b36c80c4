"""The directory of checkpoints: which one is the newest complete one, and whether it is intact.

Owns names, manifests, the `latest` marker and pruning; knows nothing of what the files hold.

Protocol: begin(step) by one process → every rank writes its files and calls seal(step, rank, files)
→ after all of them, one process calls commit(step, cursor). Only commit makes a checkpoint visible: it
replaces the marker by an atomic rename, so a run killed earlier resumes from the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rollout.cursor import Cursor
from rollout.errors import CheckpointBroken

MARKER = "latest"
CURSOR_FILE = "cursor.json"
CHUNK_BYTES = 16 * 2**20


def file_digest(path: Path) -> str:
    """BLAKE2b-128 of a file's bytes."""
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text)
    _fsync(draft)
    draft.replace(path)
    _fsync(path.parent)


@dataclass(frozen=True, slots=True)
class CheckpointDir:
    """Checkpoints under one directory, which every rank can reach.

    Attributes:
        root: The directory; created when needed.
        num_ranks: Ranks that write each checkpoint; one of another number is refused.
    """

    root: Path
    num_ranks: int

    @staticmethod
    def tag(step: int) -> str:
        return f"step-{step:06d}"

    def path(self, step: int) -> Path:
        return self.root / self.tag(step)

    def begin(self, step: int) -> None:
        """Make an empty directory for a step, clearing what a killed run left there.

        The marker is withdrawn first when it names this step, so it never names a partial one.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        marker = self.root / MARKER
        if marker.is_file() and marker.read_text().strip() == self.tag(step):
            marker.unlink()
        shutil.rmtree(self.path(step), ignore_errors=True)
        self.path(step).mkdir()

    def seal(self, step: int, rank: int, files: list[Path]) -> None:
        """Flush a rank's files to disk and note their sizes and digests."""
        manifest = {}
        for file in files:
            _fsync(file)
            manifest[file.name] = [file.stat().st_size, file_digest(file)]
        _write_atomically(self.path(step) / f"manifest-{rank}.json", json.dumps(manifest, indent=1))

    def commit(self, step: int, cursor: Cursor, keep: int) -> None:
        """Make a checkpoint that every rank has sealed the newest one, and delete old ones.

        Raises:
            CheckpointBroken: If a rank has not sealed its files.
        """
        missing = [r for r in range(self.num_ranks) if not self._manifest(step, r).is_file()]
        if missing:
            raise CheckpointBroken(f"checkpoint {self.path(step)}: ranks {missing} have not saved")
        _write_atomically(self.path(step) / CURSOR_FILE, cursor.to_json())
        _write_atomically(self.root / MARKER, self.tag(step) + "\n")
        self._prune(step, keep)

    def latest(self) -> tuple[int, Cursor] | None:
        """The newest complete checkpoint and its cursor; None when the run has none yet.

        Raises:
            CheckpointBroken: If the marker names one that is damaged or of another number of ranks.
        """
        marker = self.root / MARKER
        if not marker.is_file():
            return None
        tag = marker.read_text().strip()
        path = self.root / tag
        try:
            step = int(tag.removeprefix("step-"))
            cursor = Cursor.from_json((path / CURSOR_FILE).read_text())
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointBroken(f"checkpoint {path}: its {CURSOR_FILE} cannot be read ({error})") from None
        num_saved = len(list(path.glob("manifest-*.json")))
        if num_saved != self.num_ranks:
            raise CheckpointBroken(
                f"checkpoint {path}: got {num_saved} ranks, expected trainer.num_ranks = {self.num_ranks}"
            )
        return step, cursor

    def verify(self, step: int, rank: int) -> None:
        """Raise CheckpointBroken unless every file of a rank is as it was sealed."""
        path = self._manifest(step, rank)
        try:
            manifest = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointBroken(f"checkpoint {path}: cannot be read ({error})") from None
        for name, (size, digest) in manifest.items():
            file = path.parent / name
            got = file.stat().st_size if file.is_file() else None
            if got != size:
                raise CheckpointBroken(f"checkpoint {file}: got {got} bytes, expected {size}")
            if file_digest(file) != digest:
                raise CheckpointBroken(f"checkpoint {file}: its content has changed since it was saved")

    def _manifest(self, step: int, rank: int) -> Path:
        return self.path(step) / f"manifest-{rank}.json"

    def _prune(self, step: int, keep: int) -> None:
        others = sorted((p for p in self.root.glob("step-*") if p != self.path(step)), reverse=True)
        complete = [p for p in others if (p / CURSOR_FILE).is_file() and p.name < self.tag(step)]
        for path in others:
            if path not in complete[: keep - 1]:
                shutil.rmtree(path, ignore_errors=True)
