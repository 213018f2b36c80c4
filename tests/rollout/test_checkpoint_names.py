"""Fused training parameters against the tensors that transformers itself writes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rollout.errors import InvalidRequest
from rollout.sync.checkpoint_names import checkpoint_specs, split_parameter


def tiny_model(*, tied: bool) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=32,
            moe_intermediate_size=12,
            num_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
def test_split_parameters_are_the_checkpoint(tmp_path, tied, shard_size):
    model = tiny_model(tied=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    stored = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    specs = checkpoint_specs(tmp_path, "bfloat16")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "10KB")

    pieces = {n: t for name, p in model.named_parameters() for n, t in split_parameter(name, p.data)}
    assert pieces.keys() == specs.keys() and ("lm_head.weight" in specs) != tied
    for name, tensor in pieces.items():
        assert torch.equal(tensor, stored[name]), name
        assert specs[name].shape == tuple(tensor.shape) and specs[name].dtype == "bfloat16"


def test_pieces_are_views():
    fused = torch.zeros(2, 6, 4)
    for _, view in split_parameter("model.layers.0.mlp.experts.gate_up_proj", fused):
        view.fill_(1.0)
    assert fused.min() == 1


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", (2, 6, 4)),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 5, 4)),
        ("model.layers.0.mlp.experts.down_proj", (6, 4)),
        ("model.layers.0.mlp.experts.weight", (2, 6, 4)),
    ],
)
def test_unknown_layouts_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"expected .*\[E, |expected a plain"):
        split_parameter(name, torch.empty(shape, device="meta"))


def test_rotary_buffers_and_tied_heads_are_left_out(tmp_path):
    tiny_model(tied=False).save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    specs = checkpoint_specs(tmp_path, "float32")
    assert not any("inv_freq" in name for name in specs) and "lm_head.weight" not in specs


def test_missing_directories_are_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        checkpoint_specs(tmp_path / "nowhere", "float32")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="safetensors"):
        checkpoint_specs(tmp_path, "float32")
