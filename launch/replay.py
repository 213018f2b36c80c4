"""Generates a trajectory of a journal again and compares it token by token.

    python -m launch.replay trajectory=GROUP/INDEX journal=sqlite:///runs/NAME/journal.sqlite [run_id=…] [overrides …]
    python -m launch.replay journal=… [run_id=…] --list            id, status, tokens and versions of every trajectory

The engines are started with the run's model and quantisation: as its run directory has them (config.yaml beside the
journal), or as given by overrides (experiment=…). Each version that the trajectory was sampled under is loaded as far
as it can be had: version 0 is the model directory, later ones are in the run's checkpoints if they were saved. A long
trajectory is generated in pieces side by side, each from the recorded tokens before it: if every piece agrees, so does
the whole. Exit code 0 if all that can be had agrees (near ties are shown), 1 if not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from launch.arguments import split_arguments
from launch.cluster import start_ray
from launch.replay_pieces import Verdict
from launch.replay_run import StoredRun, replay, stored_run
from rollout.config import JournalConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.journal.opening import open_reader
from rollout.journal.reading import Reader, slices
from rollout.journal.records import RestoredTrajectory, TrajectoryKey, TrajectoryRecord
from rollout.types import VersionSpan

SHOWN = 20  # differences


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is replayed.

    Attributes:
        trajectory: Its id, "<group id>/<sample index>"; see --list.
        journal: DSN of the journal, as in journal.dsn.
        run_id: The run; None = the only one in the journal.
        piece_tokens: Length of the pieces that are generated side by side; the whole trajectory as one piece shows
            that nothing hinges on the recorded tokens.
    """

    trajectory: str | None = None
    journal: str | None = None
    run_id: str | None = None
    piece_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.piece_tokens < 1:
            raise InvalidRequest("piece_tokens", self.piece_tokens, "an integer ≥ 1")


def choose_run(reader: Reader, run_id: str | None) -> str:
    """The run that is meant. Raises InvalidRequest if that is none or several."""
    known = reader.run_ids()
    if run_id is None and len(known) == 1:
        return known[0]
    if run_id not in known:
        names = ", ".join(known) or "none: the journal is empty"
        raise InvalidRequest("run_id", run_id or "none", f"one of {names}")
    return run_id


def listing(reader: Reader, run_id: str) -> list[str]:
    """One line a trajectory of a run, in the order of submission."""
    lines = [f"{'trajectory':<32} {'status':<10} {'tokens':>7} {'chunks':>6}  versions"]
    for keys in slices(reader.run_keys(run_id)):
        for group in reader.load(keys):
            lines += [_line(one, group.is_compacted) for one in group.trajectories]
    return lines


def _line(one: RestoredTrajectory, is_compacted: bool) -> str:
    outline = one.outline
    versions = ", ".join(str(span.version) for span in outline.weight_versions) or "-"
    what = "dropped after their retention time" if is_compacted else versions
    tokens, chunks = ("-", "-") if is_compacted else (str(one.num_tokens), str(len(one.chunks)))
    return f"{outline.trajectory_id:<32} {outline.status.value:<10} {tokens:>7} {chunks:>6}  {what}"


def load(reader: Reader, run_id: str, trajectory_id: str) -> TrajectoryRecord:
    """The trajectory. Raises InvalidRequest if there is none of that id, or nothing of it to compare."""
    key = TrajectoryKey.parse(run_id, trajectory_id)
    record = reader.trajectory(key)
    if record.restored.num_tokens == 0:
        raise InvalidRequest("trajectory", str(key), "one with tokens")
    return record


def tell(record: TrajectoryRecord, verdict: Verdict) -> list[str]:
    """The comparison in words."""
    spans = record.restored.outline.weight_versions
    lines = [
        f"{record.restored.outline.trajectory_id}: {record.restored.num_tokens} tokens in "
        f"{len(record.restored.chunks)} chunks on shards {shards_of(record)}, {_span_text(spans)}"
    ]
    missing = [span for span in spans if span.version in verdict.missing_versions]
    if missing:
        lines.append(f"not compared, as no checkpoint of these versions was kept: {_span_text(missing)}")
    lines += [f"  {one}" for one in verdict.differences[:SHOWN]]
    if len(verdict.differences) > SHOWN:
        lines.append(f"  … {len(verdict.differences) - SHOWN} more")
    lines.append(
        f"{verdict.num_compared} tokens compared, {verdict.num_same} the same (log-probabilities within "
        f"{verdict.max_logprob_gap:.1e}), {verdict.num_near_ties} near ties"
    )
    lines.append(verdict.text)
    return lines


def shards_of(record: TrajectoryRecord) -> str:
    """Where its chunks ran, in order, repetitions left out."""
    ranks = [chunk.shard for chunk in record.restored.chunks]
    moves = [rank for i, rank in enumerate(ranks) if i == 0 or rank != ranks[i - 1]]
    return " → ".join(str(rank) for rank in moves)


def _span_text(spans: Sequence[VersionSpan]) -> str:
    return ", ".join(f"version {span.version} for tokens {span.start} to {span.stop - 1}" for span in spans)


def run(options: Options, overrides: Sequence[str], is_list: bool) -> int:
    """List, or replay. Returns the exit code."""
    if options.journal is None:
        raise InvalidRequest("journal", "none", "the DSN of a journal, such as sqlite:///runs/NAME/journal.sqlite")
    with open_reader(JournalConfig(dsn=options.journal)) as reader:
        run_id = choose_run(reader, options.run_id)
        if is_list:
            print("\n".join(listing(reader, run_id)))
            return 0
        if options.trajectory is None:
            raise InvalidRequest("trajectory", "none", "the id of one, as --list shows them")
        record = load(reader, run_id, options.trajectory)
    stored: StoredRun = stored_run(options.journal, overrides)
    print(f"starting {stored.config.engine.num_all_shards} shards of {Path(stored.config.model.path).name}", flush=True)
    start_ray(stored.config)
    try:
        verdict = replay(stored, record, options.piece_tokens)
    finally:
        ray.shutdown()
    print("\n".join(tell(record, verdict)))
    return 0 if verdict.is_same else 1


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, [a for a in arguments if a != "--list"])
        return run(options, overrides, "--list" in arguments)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
