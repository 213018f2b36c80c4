"""Markers, their order, and the environment every test runs in. Engine fixtures: tests/actors/conftest.py."""

from __future__ import annotations

import os
import secrets

import hypothesis
import pytest

MARKERS = {
    "ray": "starts a Ray cluster",
    "engine": "starts vLLM engines",
    "browser": "drives a headless browser",
    "slow": "takes more than half a minute",
    "gpu": "needs a GPU",
}
"""In the order in which marked tests run, after all unmarked ones."""

os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_worker_niceness="0",
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    # One token for every Ray of the tests, chosen before Ray is imported: Ray caches the mode it first sees.
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
)


# A deadline for one example measures what else the machine does: a first call that imports or compiles breaks it.
hypothesis.settings.register_profile("longroll", deadline=None)
hypothesis.settings.load_profile("longroll")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first; gpu tests only where there is one."""
    order = list(MARKERS)

    def place(item: pytest.Item) -> int:
        return max((order.index(mark.name) + 1 for mark in item.iter_markers() if mark.name in order), default=0)

    items.sort(key=place)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
