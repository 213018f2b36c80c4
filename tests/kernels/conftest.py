"""Registers the marker of tests that need CUDA, so that the kernels' tests also run on their own."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
