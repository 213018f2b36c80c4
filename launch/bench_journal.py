"""How fast the journal makes tokens durable, what that costs, and how fast it comes back after a crash.

    python -m launch.bench_journal [dsn=postgresql://…] [chunk_tokens=2048,64] [out=PATH] [options …]

Writing, for each chunk size: `in_flight` trajectories append chunk after chunk, each waiting until its last one is
durable, as the scheduler does; tokens a second, CPU time a token, stored bytes a token and the longest transaction.
Recovery: `trajectories` unfinished ones of `recovery_chunks` chunks are written, the journal is opened again and all of
them are read into memory: seconds until open (with its check for damage), until all are there as packed tokens, and
(apart, since a scheduler may do that when it needs each) until all are lists of Python numbers.

A SQLite file is created anew in a directory of its own (under `dir`) and deleted at the end. A PostgreSQL journal gets
runs with fresh names, which are acknowledged nowhere: use a schema of its own and drop it afterwards.
"""

from __future__ import annotations

import asyncio
import gc
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from launch.arguments import split_arguments
from rollout.config import JournalConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.journal.journal import Journal
from rollout.journal.opening import open_journal
from rollout.journal.records import TrajectoryKey
from rollout.types import ChunkResult, FinishReason, Prompt, RolloutRequest, SamplingParams, VersionSpan

GROUP_SAMPLES = 16
VOCAB = 150_000
REQUEST_GROUPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        dsn: A journal that is kept; None = a SQLite file of its own.
        dir: Where that file goes; None = the system's directory for temporary files.
        synchronous: full or normal.
        group_commit_ms: As in JournalConfig.
        chunk_tokens: Sizes of chunks.
        tokens: Written with each size; more than fits SQLite's log, so that copying it into the file is included.
        in_flight: Trajectories that append at the same time.
        prompt_tokens: Of each group.
        trajectories, recovery_chunks: Written for recovery, in chunks of the first size.
        repeats: Times each is measured; the median is reported.
        out: JSON file for the result.
    """

    dsn: str | None = None
    dir: str | None = None
    synchronous: str = "full"
    group_commit_ms: float = 5.0
    chunk_tokens: tuple[int, ...] = (2048, 64)
    tokens: int = 16_000_000
    in_flight: int = 256
    prompt_tokens: int = 512
    trajectories: int = 10_000
    recovery_chunks: int = 2
    repeats: int = 3
    out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """Median over the repeats of one chunk size; `cpu_us_per_token` is of the whole process."""

    chunk_tokens: int
    tokens_per_s: float
    cpu_us_per_token: float
    bytes_per_token: float
    chunks_per_commit: float
    max_commit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Median over the repeats; `total_s` = opening with its check + reading everything."""

    trajectories: int
    tokens: int
    stored_bytes: int
    open_s: float
    restore_s: float
    unpack_s: float
    total_s: float


def results(chunk_tokens: int, count: int) -> list[ChunkResult]:
    """Chunks of random tokens with float32 log-probabilities, as engines return them."""
    generator = np.random.default_rng(0)
    span = VersionSpan(version=3, start=0, stop=chunk_tokens)
    return [
        ChunkResult(
            trajectory_id="bench",
            token_ids=tuple(generator.integers(0, VOCAB, chunk_tokens).tolist()),
            logprobs=tuple((-generator.exponential(1.0, chunk_tokens)).astype(np.float32).tolist()),
            spans=(span,),
            finish_reason=FinishReason.LENGTH,
            shard=1,
            ttft_s=0.125,
            duration_s=20.5,
        )
        for _ in range(count)
    ]


async def submit(journal: Journal, run_id: str, num_groups: int, prompt_tokens: int) -> list[TrajectoryKey]:
    """Submit groups and return the keys of their trajectories."""
    keys = []
    for first in range(0, num_groups, REQUEST_GROUPS):
        ids = tuple(f"g{i}" for i in range(first, min(first + REQUEST_GROUPS, num_groups)))
        prompts = tuple(Prompt(token_ids=(7,) * prompt_tokens, prompt_id=one) for one in ids)
        request = RolloutRequest(
            prompts=prompts,
            n_samples_per_prompt=GROUP_SAMPLES,
            sampling=SamplingParams(max_tokens=32_768),
            run_seed=1,
            group_ids=ids,
        )
        await journal.submit(run_id, request, "bench")
        keys += [
            TrajectoryKey(run_id=run_id, group_id=one, sample_index=i) for one in ids for i in range(GROUP_SAMPLES)
        ]
    return keys


async def append_all(journal: Journal, keys: list[TrajectoryKey], chunks: list[ChunkResult], count: int) -> None:
    """Append `count` chunks to each trajectory, one after the other; trajectories side by side."""

    async def one(place: int, key: TrajectoryKey) -> None:
        start = 0
        for i in range(count):
            chunk = chunks[(place + i) % len(chunks)]
            await journal.append_chunk(key, 0, start, chunk)
            start += len(chunk.token_ids)

    await asyncio.gather(*(one(place, key) for place, key in enumerate(keys)))


async def write(config: JournalConfig, options: Options, chunk_tokens: int) -> Writing:
    """One repeat of writing."""
    async with open_journal(config) as journal:
        num_groups = -(-options.in_flight // GROUP_SAMPLES)
        keys = await submit(journal, f"write-{secrets.token_hex(4)}", num_groups, options.prompt_tokens)
        keys = keys[: options.in_flight]
        chunks = results(chunk_tokens, 64)
        count = -(-options.tokens // (chunk_tokens * len(keys)))
        commits = journal.counts.num_commits
        begun, cpu = time.perf_counter(), time.process_time()
        await append_all(journal, keys, chunks, count)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        counts = journal.counts
        return Writing(
            chunk_tokens=chunk_tokens,
            tokens_per_s=counts.num_tokens / wall,
            cpu_us_per_token=1e6 * cpu / counts.num_tokens,
            bytes_per_token=counts.num_bytes / counts.num_tokens,
            chunks_per_commit=counts.num_chunks / (counts.num_commits - commits),
            max_commit_s=counts.max_commit_s,
        )


async def fill(config: JournalConfig, options: Options) -> tuple[int, int]:
    """Write what recovery reads; returns tokens and bytes."""
    async with open_journal(config) as journal:
        num_groups = -(-options.trajectories // GROUP_SAMPLES)
        keys = await submit(journal, f"recovery-{secrets.token_hex(4)}", num_groups, options.prompt_tokens)
        chunks = results(options.chunk_tokens[0], 64)
        await append_all(journal, keys[: options.trajectories], chunks, options.recovery_chunks)
        return journal.counts.num_tokens, journal.counts.num_bytes


async def recover(config: JournalConfig) -> tuple[float, float, float, int]:
    """Open the journal and read all that is unfinished; seconds of both and of unpacking, and tokens."""
    gc.collect()
    begun = time.perf_counter()
    async with open_journal(config) as journal:
        opened = time.perf_counter()
        groups = [group async for group in journal.restore()]
        done = time.perf_counter()
    tokens = sum(one.num_tokens for group in groups for one in group.trajectories)
    unpacked = [group.to_group() for group in groups]
    unpack_s = time.perf_counter() - done
    assert len(unpacked) == len(groups)
    return opened - begun, done - opened, unpack_s, tokens


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def measure_writing(config: JournalConfig, options: Options, chunk_tokens: int) -> Writing:
    repeats = [asyncio.run(write(config, options, chunk_tokens)) for _ in range(options.repeats)]
    middle = {name: median([asdict(one)[name] for one in repeats]) for name in asdict(repeats[0])}
    del middle["chunk_tokens"]
    return Writing(chunk_tokens=chunk_tokens, **middle)


def measure_recovery(config: JournalConfig, options: Options) -> Recovery:
    num_tokens, num_bytes = asyncio.run(fill(config, options))
    repeats = [asyncio.run(recover(config)) for _ in range(options.repeats)]
    if repeats[0][3] < num_tokens:
        raise LongrollError(f"recovery: got {repeats[0][3]} tokens, expected at least {num_tokens}")
    return Recovery(
        trajectories=options.trajectories,
        tokens=num_tokens,
        stored_bytes=num_bytes,
        open_s=median([one[0] for one in repeats]),
        restore_s=median([one[1] for one in repeats]),
        unpack_s=median([one[2] for one in repeats]),
        total_s=median([one[0] + one[1] for one in repeats]),
    )


def run(options: Options) -> dict[str, object]:
    """Everything that was asked for, as a record."""
    record: dict[str, object] = {"options": asdict(options)}
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="longroll-journal-") as directory:

        def config(name: str) -> JournalConfig:
            dsn = options.dsn or f"sqlite:///{Path(directory) / name}"
            return JournalConfig(dsn=dsn, synchronous=options.synchronous, group_commit_ms=options.group_commit_ms)

        writing = [measure_writing(config(f"write-{size}.db"), options, size) for size in options.chunk_tokens]
        record["writing"] = [asdict(one) for one in writing]
        record |= {f"tokens_per_s_{one.chunk_tokens}": one.tokens_per_s for one in writing}
        if options.trajectories:
            recovery = measure_recovery(config("recovery.db"), options)
            record |= {"recovery": asdict(recovery), "recovery_s": recovery.total_s}
    return record


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, rest = split_arguments(Options, arguments)
        if rest:
            raise InvalidRequest("argument", rest[0], "one of the options in --help")
        record = run(options)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps({key: value for key, value in record.items() if key != "options"}, indent=2))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
