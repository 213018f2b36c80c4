"""The commands that README and docs/ give are there and understand what they are given."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from launch.arguments import split_arguments
from launch.compose import compose

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
PICKS_WORDS = {"launch.submit", "launch.keys"}  # their arguments are words, tested in their own tests
"""Commands whose arguments are not key=value."""


def commands() -> list[str]:
    """Every command of an indented or quoted line, without its comment, continuation lines joined."""
    found: set[str] = set()
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"python -m ((?:launch|kernels)\.[^\n`|]+)", text):
            found.add(" ".join(line.split(" #")[0].split()))
    return sorted(found)


def test_there_are_commands_on_every_page_that_promises_some() -> None:
    assert len(commands()) > 20


@pytest.mark.parametrize("command", commands())
def test_command_takes_its_arguments(command: str) -> None:
    name, *arguments = shlex.split(command)
    module = importlib.import_module(name)
    assert callable(module.main)
    options = getattr(module, "Options", None)
    given = [argument for argument in arguments if "=" in argument]
    if name in PICKS_WORDS:
        return
    if hasattr(module, "parse"):  # it takes no overrides
        module.parse(given)
        return
    rest = split_arguments(options, given)[1] if dataclasses.is_dataclass(options) else given
    compose(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    for place in re.findall(r"`((?:rollout|actors|kernels|launch|docs|conf)/[\w/.]*)[:`]", page.read_text()):
        assert (ROOT / place).exists(), place
