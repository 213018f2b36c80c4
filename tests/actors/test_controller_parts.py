"""The controller is put together from mix-ins: none may hide another's method."""

from __future__ import annotations

import inspect

from actors.controller import Controller


def is_declared(method: object) -> bool:
    """Whether a mix-in only says that the controller has such a method."""
    return inspect.isfunction(method) and inspect.getsource(method).rstrip().endswith("raise NotImplementedError")


def test_every_method_has_one_owner_who_is_found() -> None:
    parts = [part for part in Controller.__mro__ if part is not object]
    names = {name for part in parts for name, found in vars(part).items() if inspect.isfunction(found)}
    for name in sorted(names - {"__init__"}):
        owners = [part for part in parts if name in vars(part) and not is_declared(vars(part)[name])]
        assert len(owners) == 1, f"{name}: got {[part.__name__ for part in owners]}, expected one owner"
        assert getattr(Controller, name) is vars(owners[0])[name], f"{name} of {owners[0].__name__} is hidden"
