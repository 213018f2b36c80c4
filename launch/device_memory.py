"""Memory of a running service, sampled: PSS of its processes on a CPU, nvidia-smi's figure on GPUs.

    python -m launch.device_memory pid=12345 duration_s=60 [interval_s=1] [out=PATH]

`pid` is the process that started the service (`python -m launch.serve`); its children count with it, engines and Ray's
own processes included. PSS divides a shared page by the number of processes that map it, so that the sum over
processes is what they really take. Where there is no nvidia-smi, only PSS is sampled.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from launch.arguments import split_arguments
from launch.load_statistics import quantile
from rollout.errors import InvalidRequest, LongrollError

QUERY = ("--query-gpu=memory.used", "--format=csv,noheader,nounits")
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """At one moment, `time_s` from the beginning: PSS of all processes, and of each GPU what nvidia-smi says."""

    time_s: float
    pss_bytes: int
    num_processes: int
    gpu_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Of a stretch of time; the GPU figures are those of the fullest GPU, None without one.

    Attributes:
        growth_bytes: Median PSS of the last quarter minus that of the second: what did not come to rest.
    """

    num_samples: int
    peak_pss_bytes: int
    median_pss_bytes: int
    growth_bytes: int
    peak_gpu_bytes: int | None


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all below it. Raises InvalidRequest if there is none of that id."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        raise InvalidRequest("pid", pid, "a running process") from None


def pss_bytes(pid: int) -> int:
    """Proportional set size; 0 of a process that has gone, or that is somebody else's."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    line = next((line for line in text.splitlines() if line.startswith("Pss:")), None)
    return int(line.split()[1]) * 1024 if line else 0


def parse_nvidia_smi(text: str) -> tuple[int, ...]:
    """Bytes in use of every GPU, from a line of MiB for each."""
    return tuple(int(line) * MIB for line in text.split())


def gpu_bytes() -> tuple[int, ...]:
    """Of every GPU of this machine; nothing without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ()
    done = subprocess.run(["nvidia-smi", *QUERY], capture_output=True, text=True, timeout=20)
    return parse_nvidia_smi(done.stdout) if done.returncode == 0 else ()


class MemorySampler:
    """Samples in a thread of its own, between `__enter__` and `__exit__`.

    Args:
        pid: Of the process that started the service.
        interval_s: Between two samples; a sample of a dozen large processes takes about 0.1 s of one core.
    """

    def __init__(self, pid: int, interval_s: float = 2.0) -> None:
        self.samples: list[Sample] = []
        self._pid, self._interval_s = pid, interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self._began = time.monotonic()

    def __enter__(self) -> MemorySampler:
        process_tree(self._pid)
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                processes = process_tree(self._pid)
            except InvalidRequest:  # it has ended
                return
            self.samples.append(
                Sample(
                    time_s=time.monotonic() - self._began,
                    pss_bytes=sum(pss_bytes(one.pid) for one in processes),
                    num_processes=len(processes),
                    gpu_bytes=gpu_bytes(),
                )
            )
            if self._ended.wait(self._interval_s):
                return


def memory_use(samples: Sequence[Sample]) -> MemoryUse:
    """Raises InvalidRequest if there are no samples."""
    if not samples:
        raise InvalidRequest("samples", "none", "at least one")
    pss = [one.pss_bytes for one in samples]
    quarter = max(1, len(pss) // 4)
    gpus = [max(one.gpu_bytes) for one in samples if one.gpu_bytes]
    return MemoryUse(
        num_samples=len(samples),
        peak_pss_bytes=max(pss),
        median_pss_bytes=int(quantile(pss, 0.5)),
        growth_bytes=int(quantile(pss[-quarter:], 0.5) - quantile(pss[quarter : 2 * quarter] or pss[:1], 0.5)),
        peak_gpu_bytes=max(gpus) if gpus else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Whose memory, how long and how often; `out` = JSON file."""

    pid: int = 0
    duration_s: float = 60.0
    interval_s: float = 2.0
    out: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, rest = split_arguments(Options, arguments)
        if rest:
            raise InvalidRequest("argument", rest[0], "one of this command's own options, see --help")
        with MemorySampler(options.pid, options.interval_s) as sampler:
            time.sleep(options.duration_s)
        use = memory_use(sampler.samples)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{use.num_samples} samples: PSS peak {use.peak_pss_bytes / MIB:,.0f} MiB, median "
        f"{use.median_pss_bytes / MIB:,.0f} MiB, growth {use.growth_bytes / MIB:+,.0f} MiB"
    )
    if use.peak_gpu_bytes is not None:
        print(f"fullest GPU: {use.peak_gpu_bytes / MIB:,.0f} MiB")
    if options.out is not None:
        record = {"use": asdict(use), "samples": [asdict(one) for one in sampler.samples]}
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
