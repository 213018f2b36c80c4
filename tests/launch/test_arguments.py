"""Options of a command beside Hydra's overrides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from launch.arguments import split_arguments
from rollout.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = 10
    limit: float = 1.0
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = (1,)
    full: bool = False
    out: str | None = None


def test_options_are_taken_out_and_overrides_stay_in_order() -> None:
    typed = ["experiment=x", "steps=3", "names=a,b", "engine.int4.group_size=32", "full=true", "out=f", "counts=2,4"]
    options, rest = split_arguments(Options, typed)
    assert options == Options(steps=3, names=("a", "b"), counts=(2, 4), full=True, out="f")
    assert rest == ["experiment=x", "engine.int4.group_size=32"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=many", "steps: got many, expected a value of type int"),
        ("counts=1,x", "counts: got x, expected a value of type int"),
        ("full=yes", "full: got yes, expected true or false"),
        ("steps", "key=value"),
        ("stepps=3", "steps="),
    ],
)
def test_bad_options(argument: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        split_arguments(Options, [argument])
