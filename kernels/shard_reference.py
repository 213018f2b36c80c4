"""The decode step of a shard in plain float32 torch, and the comparison of a step with it.

Owns the definition that ``shard_model.py`` is checked against. Rounding may turn a choice between near equals: an
expert, a code of the cache, a token. So the definition takes over the choices that the step wrote down and reports
how far each is from the best one, which leaves only smooth functions to compare.
"""

from dataclasses import dataclass

import torch

from kernels.gumbel_sample import gumbel_noise
from kernels.int4 import dequantise
from kernels.int4.reference import int4_moe_reference
from kernels.kv_attention import KVCache
from kernels.kv_attention.reference import gather_kv
from kernels.shard_model import DecodeBatch, Shard, ShardConfig, ShardLayer, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class StepErrors:
    """How far a step is from the definition.

    Attributes:
        logits: Largest difference over the largest logit.
        partial: The same of the last layer's experts, rows of the other ranks included.
        cache: Largest distance of a written element from its value, over the head's largest; exact rounding
            to a code leaves up to 0.5 / 127.
        choice: Largest lead of a router logit that was not chosen over one that was.
        weight: Largest difference of an expert's weight.
        token: Largest lead of a perturbed logit over the sampled one.
    """

    logits: float
    partial: float
    cache: float
    choice: float
    weight: float
    token: float


@torch.no_grad()
def step_errors(shard: Shard, batch: DecodeBatch, result: StepResult) -> StepErrors:
    """Evaluate the step that gave result in float32, after it ran, with the choices it left in batch."""
    config = shard.config
    x = shard.embedding[batch.tokens].float()
    partial = batch.gathered.float()
    cache_error = choice_error = weight_error = 0.0
    for index, layer in enumerate(shard.layers):
        attended, error = _attend(config, layer, x, batch, batch.caches[index])
        cache_error = max(cache_error, error)
        x = x + attended @ dequantise(*layer.output).T
        normed = _norm(x, layer.post_norm, config.eps)
        scores = normed @ layer.gate.float().T
        own = batch.ids[index, : len(x)].long()
        is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, own, True)
        lead = scores.masked_fill(is_chosen, -torch.inf).amax(1) - scores.gather(1, own).amin(1)
        choice_error = max(choice_error, lead.max().item())
        weights = batch.weights[index].clone()
        chances = scores.gather(1, own).softmax(-1)
        weight_error = max(weight_error, (chances - weights[: len(x)]).abs().max().item())
        weights[: len(x)] = chances
        rows = torch.cat([normed, batch.gathered[len(x) :].float()])
        partial = int4_moe_reference(rows, layer.w13, layer.w2, weights, batch.ids[index], shard.expert_map)
        x = x + partial[: len(x)]
    logits = _norm(x, shard.final_norm, config.eps) @ shard.head.float().T
    perturbed = logits / batch.temperature[:, None] + gumbel_noise(batch.seeds, batch.positions, config.vocab_size)
    sampled = perturbed.gather(1, result.tokens[:, None]).squeeze(1)
    return StepErrors(
        logits=_relative(result.logits, logits),
        partial=_relative(result.partial, partial),
        cache=cache_error,
        choice=choice_error,
        weight=weight_error,
        token=(perturbed.amax(1) - sampled).max().item(),
    )


def _attend(
    config: ShardConfig, layer: ShardLayer, x: torch.Tensor, batch: DecodeBatch, cache: KVCache
) -> tuple[torch.Tensor, float]:
    """Return the attended heads [B, Hq * D] over what the cache holds, and the error of the token written there."""
    qkv = _norm(x, layer.input_norm, config.eps) @ dequantise(*layer.qkv).T
    heads = qkv.view(len(x), -1, config.head_dim)
    query, key, value = heads.split([config.num_query_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
    cosine, sine = batch.cos_sin[batch.positions][:, None].chunk(2, dim=-1)

    def rotate(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        low, high = _norm(row, weight, config.eps).chunk(2, dim=-1)
        return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)

    query, key = rotate(query, layer.q_norm), rotate(key, layer.k_norm)
    outputs, error = [], 0.0
    for row in range(len(x)):
        keys, values = gather_kv(cache, batch.block_table[row], batch.context)
        for stored, exact in ((keys[-1], key[row]), (values[-1], value[row])):
            error = max(error, ((stored - exact).abs() / exact.abs().amax(-1, keepdim=True)).max().item())
        grouped = query[row].view(config.num_kv_heads, -1, config.head_dim)
        scores = torch.einsum("hgd,thd->hgt", grouped, keys) * config.head_dim**-0.5
        outputs.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), values).flatten())
    return torch.stack(outputs), error


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).abs().max() / expected.abs().max()).item()
