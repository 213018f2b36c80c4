"""What README.md promises exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from launch.compose import compose

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return block


def test_example_is_short_and_its_imports_work() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 17
    imports = [node for node in ast.parse(example()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(body=imports, type_ignores=[]), "README.md", "exec"), {})


@pytest.mark.parametrize("place", re.findall(r"`((?:rollout|actors|kernels|launch)/[\w/.:]+)`", README))
def test_map_points_at_something(place: str) -> None:
    path, _, name = place.partition(":")
    assert (ROOT / path).exists(), path
    if name:
        names = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        }
        assert set(name.split(".")) <= names, name


@pytest.mark.parametrize("target", re.findall(r"^ +make (\w+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", re.findall(r"python -m launch\.(?:train|submit) ([^\n#`]+=[^\n#`]+)", README))
def test_overrides_in_commands_compose(command: str) -> None:
    compose([word for word in command.split() if "=" in word and not word.startswith("-")])


def test_experiments_named_exist() -> None:
    for name in re.findall(r"`(?:experiment=)?(qwen3_235b_\w+|tiny_grpo)`", README):
        assert (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file()
