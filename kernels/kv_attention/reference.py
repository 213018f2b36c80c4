"""Plain torch on the INT8 KV cache: the definition that the CPU and Triton implementations are tested against.

Owns the arithmetic, token by token and head by head, in float32. Made to be read, not to be fast.

Shape legend: T rows of a step, B sequences, Hq query heads, Hkv KV heads, D head dimension, L context.

Sources: one symmetric scale per token and head follows KIVI (Liu et al., 2024) for values and vLLM's
int8_per_token_head for both; rotary embedding in its half-split form is GPT-NeoX's (Su et al., RoFormer,
2021); grouped-query attention is Ainslie et al., 2023; RMSNorm is Zhang and Sennrich, 2019.
"""

import torch

from kernels.kv_attention.cache import KVCache, check_attention, check_norm_rope, check_write


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes [..., D] int8, scale [...] float32) of x [..., D]; the zero vector has scale 0.

    A scale below float32's normal numbers has lost bits; the clamp keeps its codes legal.
    """
    x = x.float()
    scale = x.abs().amax(-1) / 127
    divisor = torch.where(scale > 0, scale, 1.0)
    codes = (x / divisor.unsqueeze(-1)).clamp(-127, 127).round().to(torch.int8)
    return codes, scale


def norm_rope_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> torch.Tensor:
    """Return float32 RMSNorm over D, then rotation of element i with element i + D / 2.

    Args:
        x: [T, H, D].
        weight: [D].
        eps: Added to the mean square.
        positions: [T] int64.
        cos_sin_cache: [max_position, D], the D / 2 cosines first, then the sines.
    """
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@torch.no_grad()
def write_kv_reference(key: torch.Tensor, value: torch.Tensor, cache: KVCache, *, slot_mapping: torch.Tensor) -> None:
    """Quantise key and value [T, Hkv, D] and write row t at slot_mapping[t]; -1 writes nothing."""
    check_write(key, value, cache, slot_mapping)
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        place = divmod(slot, cache.block_size)
        cache.key[place], cache.key_scale[place] = quantise(key[t])
        cache.value[place], cache.value_scale[place] = quantise(value[t])


@torch.no_grad()
def norm_rope_write_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: KVCache,
    *,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Normalise and rotate query and key, write key and value, return the query [T, Hq, D] in its dtype.

    All in float32: the query is rounded once, at the end, and the key is quantised unrounded.
    """
    check_write(key, value, cache, slot_mapping)
    check_norm_rope(query, key, (q_weight, k_weight), positions, cos_sin_cache, cache)
    key = norm_rope_reference(key, k_weight, eps, positions, cos_sin_cache)
    write_kv_reference(key, value.float(), cache, slot_mapping=slot_mapping)
    return norm_rope_reference(query, q_weight, eps, positions, cos_sin_cache).to(query.dtype)


def gather_kv(cache: KVCache, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the dequantised key and value [length, Hkv, D] float32 of one sequence."""
    slots = torch.arange(length, device=blocks.device)
    place = blocks[slots // cache.block_size].long(), slots % cache.block_size
    key = cache.key[place].float() * cache.key_scale[place].unsqueeze(-1)
    value = cache.value[place].float() * cache.value_scale[place].unsqueeze(-1)
    return key, value


@torch.no_grad()
def prefill_attention_reference(
    query: torch.Tensor,
    cache: KVCache,
    *,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output [T, Hq, D] in the query's dtype, log-sum-exp [T, Hq] float32).

    Row i of sequence b's n rows sits at position seq_lens[b] - n + i and attends to the positions up to
    its own. Rows of no sequence and rows with nothing to attend to give 0 and -inf.
    """
    check_attention(query, cache, block_table, query_start_loc, seq_lens, scale)
    output = torch.zeros_like(query)
    lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
    group = query.shape[1] // cache.num_kv_heads
    starts = query_start_loc.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        key, value = gather_kv(cache, block_table[b], length)
        for row in range(starts[b], starts[b + 1]):
            visible = length - starts[b + 1] + row + 1
            for head in range(query.shape[1]):
                scores = key[:visible, head // group] @ query[row, head].float() * scale
                output[row, head] = scores.softmax(0) @ value[:visible, head // group]
                lse[row, head] = scores.logsumexp(0)
    return output, lse


def decode_attention_reference(
    query: torch.Tensor, cache: KVCache, *, block_table: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what prefill returns for one row a sequence, at position seq_lens - 1; length 0 gives 0 and -inf."""
    check_attention(query, cache, block_table, None, seq_lens, scale)
    has_row = (seq_lens > 0).int()
    output, lse = torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf, device=query.device)
    is_used = has_row.bool()
    output[is_used], lse[is_used] = prefill_attention_reference(
        query[is_used],
        cache,
        block_table=block_table,
        query_start_loc=torch.nn.functional.pad(has_row.cumsum(0), (1, 0)).int(),
        seq_lens=seq_lens,
        scale=scale,
    )
    return output, lse
