"""Tokens that engines have sampled, counted in files that outlive them.

Owns the files: one for each engine process, which it alone writes. A count in memory would die with the process, and
what a killed engine had generated is just what must be known.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

DIGITS = 20


class TokenCount:
    """The count of this process.

    Args:
        folder: Where the file goes; made if needed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns()}-{os.getpid()}"  # process ids come back
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._total = 0

    def add(self, num_tokens: int) -> None:
        """Count on. What was written survives the death of the process, though not that of the machine."""
        if num_tokens:
            self._total += num_tokens
            os.pwrite(self._file, f"{self._total:0{DIGITS}d}".encode(), 0)


def total_tokens(folder: Path) -> int:
    """Sum over all processes that ever counted there; 0 for a folder that is not there."""
    return sum(int(path.read_text() or 0) for path in folder.glob("*"))
