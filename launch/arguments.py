"""The `key=value` options that a command adds to Hydra's overrides, as a dataclass.

Owns parsing and its errors. Knows nothing of any one command.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from rollout.errors import InvalidRequest

T = TypeVar("T")
CONVERTERS: dict[Any, Any] = {int: int, float: float, str: str}


def split_arguments(options: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Take a command's own options out of its arguments.

    Args:
        options: Dataclass with defaults; fields are int, float, str, bool, str | None, or a tuple of one of
            the first three (written with commas).
        arguments: As typed, "key=value".

    Returns:
        The options, and the arguments that are not among them, in order.

    Raises:
        InvalidRequest: A value of the wrong type, or an argument without "=".
    """
    kinds = typing.get_type_hints(options)
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    rest: list[str] = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise InvalidRequest("argument", argument, f"key=value, with a key of {', '.join(names)} or an override")
        if key in names:
            values[key] = _convert(key, text, kinds[key])
        elif "." not in key and difflib.get_close_matches(key, names, n=1, cutoff=0.8):
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.8)[0]
            raise InvalidRequest("argument", argument, f"{close}=…")
        else:
            rest.append(argument)
    return options(**values), rest


def _convert(key: str, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_convert(key, part, item) for part in text.split(",") if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InvalidRequest(key, text, "true or false")
        return text.lower() == "true"
    if typing.get_args(kind):  # X | None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    try:
        return CONVERTERS[kind](text)
    except ValueError:
        raise InvalidRequest(key, text, f"a value of type {kind.__name__}") from None
