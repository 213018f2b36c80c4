"""Compiles C++ kernels for CPUs with AVX-512 and its bfloat16, each into a library; with tiles (AMX) where there are.

A library is built in some seconds at the first call and kept in the user's cache folder, under a digest of sources,
flags and compiler, so that it always fits the source and the engines of a machine build it once. Where it cannot be
built or run, the caller hears None and uses torch's own operation.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512bf16", "fma")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", *(f"-m{name}" for name in _INSTRUCTIONS))
_TILE_FLAGS = ("-mamx-tile", "-mamx-bf16", "-DLONGROLL_TILES")
_COMPILE_TIMEOUT_S = 120


@functools.cache
def has_tiles() -> bool:
    """Whether the CPU has AMX and this process, by having asked, may use it."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._init_amx()


@functools.cache
def vector_library(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file, which run on torch's threads.

    Args:
        source: Defines ``extern "C" int is_supported()``: whether the CPU has the vector instructions it uses. It is
            compiled with ``LONGROLL_TILES`` defined where there are tiles.

    Returns:
        The library, or None on a CPU without AVX-512 or its bfloat16, or a machine without a compiler that knows them.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        library = _compiled(source)
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or ""
        log.warning("torch's slower kernels are used: %s does not build: %s %s", source, error, stderr[-500:])
        return None
    return library if library.is_supported() else None


def _compiled(source: Path) -> ctypes.CDLL:
    """Load the library of a source, built if need be.

    Raises:
        OSError: No compiler, or the library does not load.
        subprocess.SubprocessError: The compiler fails or takes too long; ``stderr`` has its words.
    """
    compiler = next((name for name in (os.environ.get("CXX"), "c++", "g++") if name and shutil.which(name)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: set CXX, or install g++")
    with contextlib.suppress(OSError):  # a full disk, a damaged file: build it for this process alone
        if (folder := _cache_folder()) is not None:
            return ctypes.CDLL(str(_kept(folder, compiler, source)))
    with tempfile.TemporaryDirectory(prefix="longroll-") as temporary:
        _build(compiler, source, made := Path(temporary) / "library.so")
        return ctypes.CDLL(str(made))


def _kept(folder: Path, compiler: str, source: Path) -> Path:
    """The library of a source in the cache folder."""
    kept = folder / f"{source.stem}-{_digest(compiler, source)}.so"
    if not (kept.exists() and _is_private(kept.lstat())):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _build(compiler, source, made := Path(temporary) / "library.so")
            made.chmod(0o500)
            made.replace(kept)  # at once: others may be building the same
    return kept


def _build(compiler: str, source: Path, library: Path) -> None:
    """Compile a source into a library.

    Linked without OpenMP's runtime: its symbols are found in the one torch has loaded, whose threads are
    then the ones that are counted and bound.
    """
    made = str(library.with_suffix(".o"))
    for command in ((*_flags(), "-c", str(source), "-o", made), ("-shared", made, "-o", str(library))):
        subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)


def _flags() -> tuple[str, ...]:
    """Of the compiler, on this machine."""
    return (*_FLAGS, *_TILE_FLAGS) if has_tiles() else _FLAGS


def _digest(compiler: str, source: Path) -> str:
    """Of all that a library follows from; every header counts for every source."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S
    ).stdout
    parts = [version, repr(_flags()).encode(), source.read_bytes()]
    parts += [header.read_bytes() for header in sorted(Path(__file__).parent.rglob("*.h"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cache_folder() -> Path | None:
    """Where libraries are kept; None if there is no folder that only this user, or root, can have written to."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = base / "longroll" / "kernels"
    if not base.is_absolute():
        return None
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    for one in (folder.parent, folder):
        one.mkdir(mode=0o700, exist_ok=True)
    is_safe = all(_is_private(one.lstat()) for one in (folder, folder.parent))
    for one in folder.parents:
        found = one.stat()
        is_open = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        is_safe = is_safe and found.st_uid in (os.getuid(), 0) and not is_open
    return folder if is_safe else None


def _is_private(found: os.stat_result) -> bool:
    """Whether only this user can write to a file or folder, which is no link."""
    is_link = stat.S_ISLNK(found.st_mode)
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_link
