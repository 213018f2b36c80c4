"""The target of a draft model as a plain Hugging Face model in one process.

Owns loading it and the layers that its draft shares. Knows nothing of drafts' training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from launch.tiny_training import EXPERTS_BY_SORTING
from rollout.config import ModelConfig
from rollout.errors import InvalidRequest
from rollout.speculation.clover import TargetLayers
from rollout.speculation.clover_config import DraftConfig, vocabulary_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A target in float32.

    Attributes:
        model: A Hugging Face causal language model.
        settings: Its config.json.
        vocabulary: Digest of its vocabulary; None without a tokenizer.json.
        eos_token_id: Ends its outputs.
    """

    model: Any
    settings: Mapping[str, Any]
    vocabulary: str | None
    eos_token_id: int

    @property
    def layers(self) -> TargetLayers:
        """What its draft shares; follows the model's weights as they change."""
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        return TargetLayers.of(embedding.detach(), head.detach())

    def check(self, draft: DraftConfig) -> None:
        """Raise InvalidRequest unless a draft is made for this target."""
        draft.check_target(
            vocab_size=self.settings["vocab_size"],
            hidden_size=self.settings["hidden_size"],
            vocabulary=self.vocabulary,
        )


def load_target(config: ModelConfig) -> Target:
    """Load a model for generation on this process's device: a GPU where there is one.

    Raises:
        InvalidRequest: It does not say which token ends an output.
    """
    folder = Path(config.path)
    settings = json.loads((folder / "config.json").read_text())
    eos = settings.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int):
        raise InvalidRequest(f"eos_token_id of {folder}", eos, "a token id")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=config.trust_remote_code
    )
    if device == "cpu" and settings.get("num_experts", settings.get("num_local_experts")):
        model.set_experts_implementation(EXPERTS_BY_SORTING)
    return Target(
        model=model.to(device).eval(), settings=settings, vocabulary=vocabulary_digest(folder), eos_token_id=eos
    )
