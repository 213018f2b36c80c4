"""Triton kernels that fill the INT8 KV cache: quantise and write, alone or after q/k norm and rotation.

Owns the two kernels and their launches. The contract is that of ``reference.py``; ``write_kv`` gives the same
bytes, ``norm_rope_write`` the same up to the rounding of the norm.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from kernels.kv_attention.cache import KVCache, check_norm_rope, check_write

_QUERY_HEADS_PER_PROGRAM = 8
_NUM_WARPS = 4

# Adding and taking away 1.5 * 2**23 leaves no bits below 1: round half to even for |x| < 2**22.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _codes(x, scale):
    """Return the int8 codes of x [H, W] float32 for scale [H]; W may be a part of a head."""
    divisor = tl.where(scale > 0.0, scale, 1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
    return ((ratio + _ROUNDER) - _ROUNDER).to(tl.int8)


@triton.jit
def _write_plain(
    x_ptr, codes_ptr, scale_ptr, head_stride, codes_head_stride, scale_head_stride, heads, mask, HEAD_DIM: tl.constexpr
):
    """Quantise one token's heads; the pointers are at the token and at its slot."""
    dims = tl.arange(0, HEAD_DIM)
    x = tl.load(x_ptr + (heads * head_stride)[:, None] + dims[None, :], mask=mask[:, None], other=0.0)
    x = x.to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
    tl.store(codes_ptr + (heads * codes_head_stride)[:, None] + dims[None, :], _codes(x, scale), mask=mask[:, None])
    tl.store(scale_ptr + heads * scale_head_stride, scale, mask=mask)


@triton.jit
def _norm_rope(x_ptr, weight_ptr, cos_sin_ptr, head_stride, heads, mask, eps, HEAD_DIM: tl.constexpr):
    """Return the two halves [H, HEAD_DIM / 2] float32 of one token's normalised and rotated heads."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HALF)
    pointers = x_ptr + (heads * head_stride)[:, None] + dims[None, :]
    first = tl.load(pointers, mask=mask[:, None], other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask[:, None], other=0.0).to(tl.float32)
    mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM
    inverse = tl.rsqrt(mean_square + eps)[:, None]
    first = first * inverse * tl.load(weight_ptr + dims).to(tl.float32)[None, :]
    second = second * inverse * tl.load(weight_ptr + HALF + dims).to(tl.float32)[None, :]
    cos = tl.load(cos_sin_ptr + dims).to(tl.float32)[None, :]
    sin = tl.load(cos_sin_ptr + HALF + dims).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _write_kv_kernel(
    key_ptr,
    value_ptr,
    slot_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scale_ptr,
    value_scale_ptr,
    key_strides,
    value_strides,
    key_cache_strides,
    value_cache_strides,
    key_scale_strides,
    value_scale_strides,
    num_heads,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Quantise and write the key and the value of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot >= 0:
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        heads = tl.arange(0, HEADS).to(tl.int64)
        mask = heads < num_heads
        _write_plain(
            key_ptr + token * key_strides[0],
            key_cache_ptr + block * key_cache_strides[0] + offset * key_cache_strides[1],
            key_scale_ptr + block * key_scale_strides[0] + offset * key_scale_strides[1],
            key_strides[1],
            key_cache_strides[2],
            key_scale_strides[2],
            heads,
            mask,
            HEAD_DIM,
        )
        _write_plain(
            value_ptr + token * value_strides[0],
            value_cache_ptr + block * value_cache_strides[0] + offset * value_cache_strides[1],
            value_scale_ptr + block * value_scale_strides[0] + offset * value_scale_strides[1],
            value_strides[1],
            value_cache_strides[2],
            value_scale_strides[2],
            heads,
            mask,
            HEAD_DIM,
        )


@triton.jit
def _norm_rope_write_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    q_weight_ptr,
    k_weight_ptr,
    position_ptr,
    cos_sin_ptr,
    slot_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scale_ptr,
    value_scale_ptr,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    cos_sin_stride,
    key_cache_strides,
    value_cache_strides,
    key_scale_strides,
    value_scale_strides,
    num_query_heads,
    num_kv_heads,
    eps,
    BLOCK_SIZE: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Serve one token's key and value (second program index 0) or some of its query heads (the others)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, HALF)
    cos_sin_ptr += tl.load(position_ptr + token) * cos_sin_stride
    if part > 0:
        heads = (part - 1) * QUERY_HEADS + tl.arange(0, QUERY_HEADS).to(tl.int64)
        mask = heads < num_query_heads
        first, second = _norm_rope(
            query_ptr + token * query_strides[0],
            q_weight_ptr,
            cos_sin_ptr,
            query_strides[1],
            heads,
            mask,
            eps,
            HEAD_DIM,
        )
        pointers = output_ptr + token * output_strides[0] + (heads * output_strides[1])[:, None] + dims[None, :]
        tl.store(pointers, first.to(output_ptr.dtype.element_ty), mask=mask[:, None])
        tl.store(pointers + HALF, second.to(output_ptr.dtype.element_ty), mask=mask[:, None])
    else:
        slot = tl.load(slot_ptr + token)
        if slot >= 0:
            block = slot // BLOCK_SIZE
            offset = slot % BLOCK_SIZE
            heads = tl.arange(0, KV_HEADS).to(tl.int64)
            mask = heads < num_kv_heads
            first, second = _norm_rope(
                key_ptr + token * key_strides[0], k_weight_ptr, cos_sin_ptr, key_strides[1], heads, mask, eps, HEAD_DIM
            )
            scale = tl.div_rn(tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1)), 127.0)
            codes_ptr = key_cache_ptr + block * key_cache_strides[0] + offset * key_cache_strides[1]
            pointers = codes_ptr + (heads * key_cache_strides[2])[:, None] + dims[None, :]
            tl.store(pointers, _codes(first, scale), mask=mask[:, None])
            tl.store(pointers + HALF, _codes(second, scale), mask=mask[:, None])
            scale_ptr = key_scale_ptr + block * key_scale_strides[0] + offset * key_scale_strides[1]
            tl.store(scale_ptr + heads * key_scale_strides[2], scale, mask=mask)
            _write_plain(
                value_ptr + token * value_strides[0],
                value_cache_ptr + block * value_cache_strides[0] + offset * value_cache_strides[1],
                value_scale_ptr + block * value_scale_strides[0] + offset * value_scale_strides[1],
                value_strides[1],
                value_cache_strides[2],
                value_scale_strides[2],
                heads,
                mask,
                HEAD_DIM,
            )


@torch.no_grad()
def write_kv_triton(key: torch.Tensor, value: torch.Tensor, cache: KVCache, *, slot_mapping: torch.Tensor) -> None:
    """Quantise key and value [T, Hkv, D] and write row t at slot_mapping[t]; -1 writes nothing.

    Raises:
        ValueError: A shape, dtype, device or stride is wrong. Slots on a device are not read.
    """
    check_write(key, value, cache, slot_mapping)
    if not len(key):
        return
    with torch.cuda.device_of(key):
        _write_kv_kernel[(len(key),)](
            key,
            value,
            slot_mapping.contiguous(),
            cache.key,
            cache.value,
            cache.key_scale,
            cache.value_scale,
            key.stride()[:2],
            value.stride()[:2],
            cache.key.stride()[:3],
            cache.value.stride()[:3],
            cache.key_scale.stride(),
            cache.value_scale.stride(),
            cache.num_kv_heads,
            BLOCK_SIZE=cache.block_size,
            HEADS=triton.next_power_of_2(cache.num_kv_heads),
            HEAD_DIM=cache.head_dim,
            num_warps=_NUM_WARPS,
        )


@torch.no_grad()
def norm_rope_write_triton(
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

    Raises:
        ValueError: A shape, dtype, device or stride is wrong. Slots and positions on a device are not read.
    """
    check_write(key, value, cache, slot_mapping)
    check_norm_rope(query, key, (q_weight, k_weight), positions, cos_sin_cache, cache)
    num_tokens, num_query_heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not num_tokens:
        return output
    query_heads = min(_QUERY_HEADS_PER_PROGRAM, triton.next_power_of_2(num_query_heads))
    with torch.cuda.device_of(query):
        _norm_rope_write_kernel[(num_tokens, 1 + triton.cdiv(num_query_heads, query_heads))](
            query,
            key,
            value,
            output,
            q_weight.contiguous(),
            k_weight.contiguous(),
            positions.contiguous(),
            cos_sin_cache,
            slot_mapping.contiguous(),
            cache.key,
            cache.value,
            cache.key_scale,
            cache.value_scale,
            query.stride()[:2],
            key.stride()[:2],
            value.stride()[:2],
            output.stride()[:2],
            cos_sin_cache.stride(0),
            cache.key.stride()[:3],
            cache.value.stride()[:3],
            cache.key_scale.stride(),
            cache.value_scale.stride(),
            num_query_heads,
            cache.num_kv_heads,
            eps,
            BLOCK_SIZE=cache.block_size,
            QUERY_HEADS=query_heads,
            KV_HEADS=triton.next_power_of_2(cache.num_kv_heads),
            HEAD_DIM=cache.head_dim,
            num_warps=_NUM_WARPS,
        )
    return output
