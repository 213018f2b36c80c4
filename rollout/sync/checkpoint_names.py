"""Names and shapes of a Hugging Face checkpoint, and how fused training parameters map onto them.

transformers fuses the experts of a layer into two parameters; checkpoints, and the engines that load
them, hold one matrix for each expert and projection. Knows nothing of training or of transports.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from rollout.errors import InvalidRequest
from rollout.sync.manifest import TensorSpec

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def checkpoint_files(model_dir: Path) -> dict[str, Path]:
    """Which file holds each tensor of a model directory.

    Tensors that are computed from the configuration (rotary frequencies), and an output head that is
    tied to the embedding, are left out: nobody trains or sends them.

    Raises:
        InvalidRequest: If the directory or its weights are missing.
    """
    if not (model_dir / "config.json").is_file():
        raise InvalidRequest("model.path", str(model_dir), "a model directory with a config.json")
    index = model_dir / INDEX_FILE
    if index.is_file():
        entries = json.loads(index.read_text())["weight_map"]
        files = {name: model_dir / file for name, file in entries.items()}
    elif (model_dir / SINGLE_FILE).is_file():
        with safe_open(model_dir / SINGLE_FILE, "pt") as opened:
            files = dict.fromkeys(opened.keys(), model_dir / SINGLE_FILE)
    else:
        raise InvalidRequest("model.path", str(model_dir), f"a directory with {SINGLE_FILE} or {INDEX_FILE}")
    is_tied = json.loads((model_dir / "config.json").read_text()).get("tie_word_embeddings", False)
    return {
        name: file
        for name, file in files.items()
        if not name.endswith("rotary_emb.inv_freq") and not (is_tied and name == "lm_head.weight")
    }


def checkpoint_specs(model_dir: str | Path, dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that is served from a model directory, by name, as it is stored but in `dtype`.

    Only the headers of the safetensors files are read.

    Raises:
        InvalidRequest: If the directory or its weights are missing.
    """
    files = checkpoint_files(Path(model_dir))
    specs: dict[str, TensorSpec] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():
                if files.get(name) == path:
                    shape = tuple(opened.get_slice(name).get_shape())
                    specs[name] = TensorSpec(name=name, shape=shape, dtype=dtype)
    return specs


def split_parameter(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The checkpoint tensors a training parameter consists of, as views of it.

    Args:
        name: Name in the training model.
        tensor: The parameter; "meta" tensors work too. Fused experts are gate_up_proj [E, 2I, H]
            (gate rows first) and down_proj [E, H, I], as in transformers 5.

    Raises:
        ValueError: For a layout that is not known, instead of sending it under a wrong name.
    """
    prefix, _, leaf = name.rpartition(".")
    if prefix.endswith(".experts") and leaf in ("gate_up_proj", "down_proj"):
        if tensor.ndim != 3 or (leaf == "gate_up_proj" and tensor.shape[1] % 2):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [E, 2I, H] or [E, H, I]")
        if leaf == "down_proj":
            return [(f"{prefix}.{e}.down_proj.weight", tensor[e]) for e in range(tensor.shape[0])]
        half = tensor.shape[1] // 2
        return [
            piece
            for e in range(tensor.shape[0])
            for piece in (
                (f"{prefix}.{e}.gate_proj.weight", tensor[e, :half]),
                (f"{prefix}.{e}.up_proj.weight", tensor[e, half:]),
            )
        ]
    if leaf not in ("weight", "bias") or tensor.ndim > 2:
        raise ValueError(
            f"parameter {name}: got an unknown layout of shape {tuple(tensor.shape)}, expected a plain "
            "weight or bias, or fused experts gate_up_proj / down_proj"
        )
    return [(name, tensor)]
