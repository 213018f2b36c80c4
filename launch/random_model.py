"""A Qwen3-MoE of some hundred million random parameters, for measurements that need weights but no answers.

The shape is a small one of the family: the experts hold most of the parameters, as in the large models.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SEED = 0
CONFIG = Qwen3MoeConfig(
    vocab_size=1024,
    hidden_size=2048,
    intermediate_size=2048,
    moe_intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


def save_random_model(directory: Path) -> int:
    """Write config.json and bfloat16 weights, one tensor for each expert. Returns the number of parameters."""
    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(CONFIG).to(torch.bfloat16)
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["eos_token_id"] = None  # generations end by their length
    (directory / "config.json").write_text(json.dumps(config))
    return sum(p.numel() for p in model.parameters())
