"""Registers the markers of the kernels' tests, so that they also run on their own, and starts what runs beside them."""

import importlib.util

import pytest
import torch

from tests.kernels import interpreted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than half a minute")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the interpreter's files that are to be looked at in the end."""
    if session.config.option.collectonly or torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    for item in session.items:
        if item.path.name == "test_triton_interpreted.py":
            interpreted.start(item.callspec.params["name"])  # type: ignore[attr-defined]


def pytest_sessionfinish() -> None:
    interpreted.stop()
