"""What a shard holds, by arithmetic."""

from __future__ import annotations

import pytest

from rollout.config import Int4Config
from rollout.errors import InvalidRequest
from rollout.memory import KV_INT8, AttentionShape, shard_weight_bytes
from rollout.sync.encoding import plan_tensors
from rollout.sync.manifest import TensorSpec

SPECS = [
    TensorSpec(name="model.embed_tokens.weight", shape=(512, 128), dtype="bfloat16"),
    TensorSpec(name="model.layers.0.self_attn.q_proj.weight", shape=(256, 128), dtype="bfloat16"),
    *(
        TensorSpec(name=f"model.layers.0.mlp.experts.{e}.up_proj.weight", shape=(64, 128), dtype="bfloat16")
        for e in range(4)
    ),
]


def test_weights_of_a_shard() -> None:
    plain = plan_tensors(SPECS, None).values()
    assert shard_weight_bytes(plain, 2) == 2 * (512 * 128 + 256 * 128 + 2 * 64 * 128)
    int4 = plan_tensors(SPECS, Int4Config(group_size=64)).values()
    per_group = 32 + 2
    assert shard_weight_bytes(int4, 2) == 2 * 512 * 128 + (256 * 2 + 2 * 64 * 2) * per_group
    with pytest.raises(InvalidRequest, match="num_shards: got 3"):
        shard_weight_bytes(plain, 3)


def test_kv_of_a_token_of_qwen3_235b() -> None:
    shape = AttentionShape(num_layers=94, num_kv_heads=4, head_dim=128)
    assert shape.kv_bytes_per_token("bfloat16") == 192_512
    assert shape.kv_bytes_per_token(KV_INT8) == 99_264
