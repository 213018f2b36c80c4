"""From YAML and command-line overrides to one checked `RunConfig`.

Owns the meeting of Hydra with the dataclasses of rollout/config.py, the checks that need more than
one section, and error messages that name what was probably meant. Starts nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.checks import check
from rollout.config import RunConfig
from rollout.errors import InvalidRequest

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = (
    "model",
    "engine",
    "sampling",
    "scheduler",
    "journal",
    "sync",
    "trainer",
    "workload",
    "cluster",
    "monitor",
    "gateway",
    "experiment",
)


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose conf/config.yaml with overrides in Hydra's syntax.

    Args:
        overrides: For example ["experiment=tiny_grpo", "trainer.lr=1e-4", "sync.in_flight=abort",
            "engine.vllm.seed=1"]; enum values may be written in lower case.

    Returns:
        Plain dataclasses with every default filled in, already checked across sections.

    Raises:
        InvalidRequest: For an unknown group, file or key, a value of the wrong type, or options that
            contradict each other.
    """
    ConfigStore.instance().store(name="run_config", node=RunConfig)
    prepared = [_prepare(override) for override in overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = hydra_compose(config_name="config", overrides=prepared)
        config = OmegaConf.to_object(composed)
    except InvalidRequest:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from error
    return _checked(config)


def read_yaml(path: Path) -> RunConfig:
    """The configuration that `to_yaml` wrote, checked.

    Raises:
        InvalidRequest: For what `compose` would refuse.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path)))
    except InvalidRequest:
        raise
    except OmegaConfBaseException as error:
        raise _explain(error, [str(path)]) from error
    return _checked(config)


def _checked(config: Any) -> RunConfig:
    assert isinstance(config, RunConfig)
    first, second = config.trainer.betas
    config.trainer.betas = (first, second)  # OmegaConf keeps sequences as lists
    check(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, every default written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def field_names(prefix: str = "", node: type = RunConfig) -> list[str]:
    """Every dotted key, such as "trainer.lr"."""
    names = []
    for name, kind in typing.get_type_hints(node).items():
        names.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            names += field_names(f"{prefix}{name}.", typing.cast(type, kind))
    return names


def _prepare(override: str) -> str:
    """Check an override's key; let dictionary fields take new keys; write enum values as OmegaConf wants them."""
    key, equals, value = override.partition("=")
    bare = key.lstrip("+~")
    if bare.startswith("hydra.") or not equals:
        return override
    if bare in GROUPS:
        _check_file(bare, value)
        return override
    kind = _kind_of(bare)
    if kind is dict and key == bare:
        return f"++{override}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{key}={value.upper()}"
    return override


def _kind_of(key: str) -> Any:
    """The type of a dotted key; `dict` for a free-form field and anything inside it."""
    node: Any = RunConfig
    seen: list[str] = []
    for part in key.split("."):
        hints = typing.get_type_hints(node)
        if part not in hints:
            raise _unknown_key(key)
        seen.append(part)
        node = _without_none(hints[part])
        if typing.get_origin(node) is dict:
            return dict
        if not dataclasses.is_dataclass(node) and seen != key.split("."):
            raise _unknown_key(key)
    return node


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _check_file(group: str, option: str) -> None:
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if option not in options and option != "null":
        raise InvalidRequest(group, option, f"one of {', '.join(options)}")


def _unknown_key(key: str) -> InvalidRequest:
    known = [name for name in field_names() if name not in GROUPS]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    last = key.rsplit(".", 1)[-1]
    close += [name for name in known if name.rsplit(".", 1)[-1] == last and name not in close]
    hint = f"did you mean {', '.join(close)}?" if close else f"a key of {', '.join(GROUPS)}"
    return InvalidRequest("configuration key", f"{key!r}, which does not exist", hint)


def _explain(error: Exception, overrides: Sequence[str]) -> InvalidRequest:
    """Hydra's and OmegaConf's errors, shortened to the line that names the fault."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    if key and "not in" in str(cause):
        return _unknown_key(str(key))
    message = str(cause).strip().splitlines()[0]
    return InvalidRequest(f"configuration {key or ' '.join(overrides)}", message, "a value of the field's type")


def model_directory(path: str) -> str:
    """Check a model path before anything starts.

    A path counts as a Hugging Face name (owner/name) only when no folder of that owner's name is here.

    Raises:
        InvalidRequest: If it is neither a model directory nor can be such a name.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return path
    is_hub_name = path.count("/") == 1 and not path.startswith((".", "/")) and not folder.parent.exists()
    if is_hub_name and os.environ.get("HF_HUB_OFFLINE") != "1":
        return path
    siblings = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
    near = f"; {folder.parent} holds {', '.join(siblings)}" if siblings else ""
    raise InvalidRequest("model.path", path, f"a directory with config.json, safetensors and tokenizer{near}")
