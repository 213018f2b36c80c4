"""Shape and origin of a Clover-2 draft model, and its files.

Owns the configuration, the checks against the target it drafts for, and reading and writing of a draft's directory
(config.json beside model.safetensors). Knows nothing of how it computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rollout.errors import InvalidRequest

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "longroll_clover2"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """A draft model. The fields of the target must equal the target's own.

    Attributes:
        vocab_size: Tokens of the target's output head.
        hidden_size: Width of the target's hidden states, and the draft's own.
        vocabulary: Digest of the target's tokens and ids, see `vocabulary_digest`; None where it was not known.
        target_version: Weight version of the target that the draft was last fitted to.
        num_layers: Transformer layers of the augmenting block.
        num_heads: Query heads of the block, and heads of the attention decoders.
        num_kv_heads: Key-value heads of the block.
        head_dim: Width of a head of the block.
        intermediate_size: Inner width of the block's feed-forward part.
        rope_theta: Base of the block's rotary positions.
        num_steps: Depths trained: the first comes from the block, the others from the regressive connection.
            Deeper trees may be asked for; the connection is shared by all depths.
    """

    vocab_size: int
    hidden_size: int
    vocabulary: str | None = None
    target_version: int = 0
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    rope_theta: float = 10_000.0
    num_steps: int = 5

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "num_steps",
        ):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"draft model's {name}", getattr(self, name), "at least 1")
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads or self.head_dim % 2:
            got = f"{self.hidden_size} over {self.num_heads} heads, {self.num_kv_heads} KV heads of {self.head_dim}"
            raise InvalidRequest(
                "draft model's heads", got, "heads that divide hidden_size, KV heads that divide heads"
            )

    @classmethod
    def for_target(cls, target: Mapping[str, Any], vocabulary: str | None = None, **own: Any) -> DraftConfig:
        """A draft for a model with this config.json.

        Args:
            target: The target's configuration, as its config.json has it.
            vocabulary: See the attribute.
            own: Fields of the draft that differ from what follows from the target.
        """
        rope = target.get("rope_parameters") or {}
        heads = target["num_attention_heads"]
        settings = {
            "num_heads": heads,
            "num_kv_heads": target["num_key_value_heads"],
            "head_dim": target.get("head_dim") or target["hidden_size"] // heads,
            "intermediate_size": 2 * target["hidden_size"],
            "rope_theta": rope.get("rope_theta", target.get("rope_theta", 10_000.0)),
        }
        shape = {"vocab_size": target["vocab_size"], "hidden_size": target["hidden_size"], "vocabulary": vocabulary}
        return cls(**shape, **(settings | own))

    def at_version(self, target_version: int) -> DraftConfig:
        """The same draft, fitted to another version of the target."""
        return replace(self, target_version=target_version)

    def check_target(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        vocabulary: str | None = None,
        version: int | None = None,
    ) -> None:
        """Refuse a target that the draft was not made for.

        Args:
            vocab_size, hidden_size: The target's.
            vocabulary: Digest of the target's vocabulary; None = not compared.
            version: Weight version the target serves; None = not compared.

        Raises:
            InvalidRequest: Names what differs.
        """
        if self.vocab_size != vocab_size:
            raise InvalidRequest("draft model's vocabulary", f"{self.vocab_size} tokens", f"the target's {vocab_size}")
        if self.hidden_size != hidden_size:
            raise InvalidRequest("draft model's hidden size", self.hidden_size, f"the target's {hidden_size}")
        if None not in (vocabulary, self.vocabulary) and vocabulary != self.vocabulary:
            raise InvalidRequest("draft model's vocabulary", self.vocabulary, f"the target's, {vocabulary}")
        if version is not None and version != self.target_version:
            raise InvalidRequest("draft model's target version", self.target_version, f"the version served, {version}")


def vocabulary_digest(model_dir: str | Path) -> str | None:
    """Digest of a model directory's tokens and their ids; None without a tokenizer.json.

    Two vocabularies of one size but of different tokens give different digests; formatting of the file does not count.
    """
    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]  # token → id, or for unigram models [token, score] in the order of ids
    tokens = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    tokens = tokens | {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
    text = json.dumps(sorted(tokens.items()), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_draft(directory: str | Path, config: DraftConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a draft's directory; existing files of the same names are replaced, each atomically.

    Args:
        directory: Made if need be.
        config: Goes to config.json.
        tensors: By name, as `CloverDraft.state_dict()` has them.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_type": MODEL_TYPE} | asdict(config), indent=2) + "\n"
    parts = folder / f".{CONFIG_FILE}.part", folder / f".{WEIGHTS_FILE}.part"
    parts[0].write_text(text)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, parts[1])
    parts[1].chmod(0o644)
    parts[1].replace(folder / WEIGHTS_FILE)
    parts[0].replace(folder / CONFIG_FILE)


def load_draft(directory: str | Path) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Read what `save_draft` wrote.

    Raises:
        InvalidRequest: No such directory, another kind of model, or damaged files.
    """
    folder = Path(directory)
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise InvalidRequest("draft model", str(folder), f"a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        values = json.loads((folder / CONFIG_FILE).read_text())
        kind = values.pop("model_type", None)
    except (ValueError, AttributeError) as error:
        raise InvalidRequest(f"draft model's {folder / CONFIG_FILE}", str(error), "a JSON object") from None
    if kind != MODEL_TYPE:
        raise InvalidRequest(f"model type of {folder}", kind, MODEL_TYPE)
    known = {field.name for field in fields(DraftConfig)}
    if unknown := sorted(set(values) - known):
        raise InvalidRequest(f"draft model's {folder / CONFIG_FILE}", unknown[0], f"one of {', '.join(sorted(known))}")
    if missing := sorted({"vocab_size", "hidden_size"} - set(values)):
        raise InvalidRequest(f"draft model's {folder / CONFIG_FILE}", f"no {missing[0]}", "a complete configuration")
    try:
        config = DraftConfig(**values)
    except TypeError as error:
        raise InvalidRequest(f"draft model's {folder / CONFIG_FILE}", str(error), "values of the right types") from None
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise InvalidRequest(f"draft model's {folder / WEIGHTS_FILE}", str(error), "a safetensors file") from None
    return config, tensors
