"""The house's rules about who may import whom, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("launch", "actors", "rollout", "kernels")  # each imports only itself and what follows it
FORBIDDEN = {"rollout": {"ray", "vllm", "deepspeed"}}
MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything a module imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    names = imported(path)
    above = set(FLOORS[: FLOORS.index(floor)])
    assert not names & above, f"{floor} must not import {names & above}"
    assert not names & FORBIDDEN.get(floor, set())
    if floor == "kernels":
        assert names <= {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)


def test_kernels_package_is_empty() -> None:
    # Hugging Face transformers probes a top-level module called `kernels`.
    assert (ROOT / "kernels" / "__init__.py").read_text().strip() == ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
