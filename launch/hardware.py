"""What a figure was measured on, in one line."""

from __future__ import annotations

from launch.summary import hardware


def hardware_line() -> str:
    """Cores that this process may use, CPU, memory, and GPUs if there are any."""
    facts = hardware()
    line = f"{facts['cores']} cores of {facts['cpu']}, {facts['memory_gb']:g} GB"
    return f"{line}, {facts['num_gpus']} × {facts['gpu']}" if facts["num_gpus"] else line
