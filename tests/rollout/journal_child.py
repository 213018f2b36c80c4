"""A process that writes a journal and is killed, or runs out of room; see test_journal_faults.

python -m tests.rollout.journal_child write DSN     append for ever; a line "sample start" for each durable chunk
python -m tests.rollout.journal_child hold DSN      open, say so, and wait to be killed
python -m tests.rollout.journal_child full DSN      append until JournalFull, make room, append again; a JSON line
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys

from rollout.journal.errors import JournalFull
from rollout.journal.journal import Journal
from rollout.journal.opening import open_journal
from tests.rollout.journal_cases import chunk_of, config_of, key_of, request_of

NUM_SAMPLES = 4
CHUNK_TOKENS = 256
FILE_BYTES = 2 * 2**20  # the log reaches it long before it is copied into the file


def seed_of(sample: int, start: int) -> int:
    """Every chunk of the child is this one's."""
    return 1_000_003 * sample + start


async def write(journal: Journal) -> None:
    known = await journal.submit("run", request_of("a", n=NUM_SAMPLES), "h")
    starts = [one.num_tokens for one in known[0].trajectories] if known else [0] * NUM_SAMPLES

    async def one(sample: int, start: int) -> None:
        while True:
            await journal.append_chunk(key_of("a", sample), 0, start, chunk_of(CHUNK_TOKENS, seed_of(sample, start)))
            print(sample, start, flush=True)
            start += CHUNK_TOKENS

    await asyncio.gather(*(one(sample, start) for sample, start in enumerate(starts)))


async def fill(journal: Journal) -> None:
    await journal.submit("run", request_of("a"), "h")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, hard))
    start, error = 0, None
    while error is None:
        try:
            await journal.append_chunk(key_of("a"), 0, start, chunk_of(CHUNK_TOKENS, seed_of(0, start)))
            start += CHUNK_TOKENS
        except JournalFull as full:
            error = str(full)
    with_room = start
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    for _ in range(3):
        await journal.append_chunk(key_of("a"), 0, start, chunk_of(CHUNK_TOKENS, seed_of(0, start)))
        start += CHUNK_TOKENS
    print(json.dumps({"error": error, "before": with_room, "after": start}), flush=True)


async def hold(journal: Journal) -> None:
    print("open", flush=True)
    signal.pause()


async def main(mode: str, dsn: str) -> None:
    async with open_journal(config_of(dsn, owner_wait_s=20.0)) as journal:
        await {"write": write, "hold": hold, "full": fill}[mode](journal)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
