"""Sizes of a model, from its configuration file.

Owns the reading. Models of the kinds that are served: mixtures of experts in every layer.
"""

from __future__ import annotations

import json
from pathlib import Path

from rollout.errors import InvalidRequest
from rollout.simulate.costs import QWEN3_235B_A22B, MoeShape

PUBLISHED_SHAPES = {"Qwen/Qwen3-235B-A22B": QWEN3_235B_A22B}  # by name, for models that are not on this machine
NAMES = {  # of a field here, and of it in config.json; transformers renamed one of them
    "num_layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "num_experts": ("num_experts", "num_local_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "expert_width": ("moe_intermediate_size",),
    "num_query_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
}


def shape_of(path: str) -> MoeShape:
    """Sizes of the model in a directory, or of a published one by its name.

    Raises:
        InvalidRequest: Neither, or a config.json of another kind of model.
    """
    if path in PUBLISHED_SHAPES:
        return PUBLISHED_SHAPES[path]
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        expected = f"a directory with config.json, or one of {', '.join(PUBLISHED_SHAPES)}"
        raise InvalidRequest("model", path, expected) from error
    sizes: dict[str, int] = {}
    for name, keys in NAMES.items():
        found = next((config[key] for key in keys if key in config), None)
        if not isinstance(found, int):
            raise InvalidRequest(f"{keys[0]} in {file}", found, "a number, as mixtures of experts have it")
        sizes[name] = found
    return MoeShape(**sizes)
