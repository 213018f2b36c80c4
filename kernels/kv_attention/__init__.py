"""Attention over a paged INT8 KV cache: quantise and write, fused norm and rotation, decoding, prefill.

The one dispatcher: CUDA tensors go to the Triton kernels, all others to batched torch operations; it imports
Triton on the first CUDA call. ``cache.py`` documents the layout and the arithmetic of a code, ``reference.py`` is
what both are tested against. Codes and scales that ``write_kv`` makes are the same bytes everywhere.

On the CPU a step's plan serves all layers: ``plan_attention`` once, then ``paged_attention_cpu`` a layer.
"""

import torch

from kernels.kv_attention.cache import KVCache, kv_cache_from_pages, page_bytes
from kernels.kv_attention.cpu import attention_cpu, norm_rope_write_cpu, paged_attention_cpu, write_kv_cpu
from kernels.kv_attention.plan import AttentionPlan, plan_attention

__all__ = [
    "AttentionPlan",
    "KVCache",
    "decode_attention",
    "kv_cache_from_pages",
    "norm_rope_write",
    "page_bytes",
    "paged_attention_cpu",
    "plan_attention",
    "prefill_attention",
    "write_kv",
]


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: KVCache, *, slot_mapping: torch.Tensor) -> None:
    """Quantise and write the key and value of each token.

    Args:
        key: [T, Hkv, D] float32, bfloat16 or float16, last dimension contiguous.
        value: As key.
        cache: Written in place.
        slot_mapping: [T] int64, block * block_size + offset; -1 writes nothing. No slot twice.

    Raises:
        ValueError: A shape, dtype, device, stride or (where it costs no sync) slot is wrong.
    """
    if key.is_cuda:
        from kernels.kv_attention.triton_write import write_kv_triton as implementation
    else:
        implementation = write_kv_cpu
    implementation(key, value, cache, slot_mapping=slot_mapping)


def norm_rope_write(
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
    """Normalise and rotate query and key, write key and value, return the query.

    RMSNorm over D with one weight vector for all heads, then rotation of element i with element i + D / 2, all in
    float32: the query is rounded once, at the end, and the key is quantised without having been rounded.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16, last dimension contiguous: a view of a fused projection
            will do.
        key: [T, Hkv, D], dtype as query.
        value: As key; written as it is.
        cache: Written in place.
        q_weight: [D] of the query's norm.
        k_weight: [D] of the key's norm.
        eps: Added to the mean square.
        positions: [T] int64.
        cos_sin_cache: [max_position, D], D / 2 cosines, then D / 2 sines.
        slot_mapping: [T] int64 as for ``write_kv``.

    Returns:
        [T, Hq, D] contiguous, dtype as query.

    Raises:
        ValueError: A shape, dtype, device, stride or (where it costs no sync) position or slot is wrong.
    """
    if query.is_cuda:
        from kernels.kv_attention.triton_write import norm_rope_write_triton as implementation
    else:
        implementation = norm_rope_write_cpu
    return implementation(
        query,
        key,
        value,
        cache,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        slot_mapping=slot_mapping,
    )


def decode_attention(
    query: torch.Tensor,
    cache: KVCache,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    max_seq_len: int | None = None,
    split_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with one row a sequence to the whole of it.

    Args:
        query: [B, Hq, D] float32, bfloat16 or float16; Hq a multiple of Hkv.
        cache: This layer's cache, already holding the rows' own tokens.
        block_table: [B, max_blocks] integer; entries past a sequence's end are not read.
        seq_lens: [B] integer, lengths with the rows' own tokens.
        scale: Factor of the scores.
        max_seq_len: CUDA only: upper bound of seq_lens known on the host, None the table's.
        split_tokens: CUDA only: tokens one program attends to, a multiple of 128; None lets the shapes decide.
            A constant makes a row's bits independent of the batch.

    Returns:
        (output [B, Hq, D] in the query's dtype, log-sum-exp [B, Hq] float32). Length 0 gives 0 and -inf.

    Raises:
        ValueError: A shape, dtype, device, stride or (where it costs no sync) length is wrong.
    """
    if query.is_cuda:
        from kernels.kv_attention.triton_decode import decode_attention_triton

        return decode_attention_triton(
            query,
            cache,
            block_table=block_table,
            seq_lens=seq_lens,
            scale=scale,
            max_seq_len=max_seq_len,
            split_tokens=split_tokens,
        )
    return attention_cpu(query, cache, block_table=block_table, query_start_loc=None, seq_lens=seq_lens, scale=scale)


def prefill_attention(
    query: torch.Tensor,
    cache: KVCache,
    *,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend causally with the last rows of each sequence to the cache, their own tokens included.

    Row i of sequence b's n rows sits at position seq_lens[b] - n + i. Its own chunk's keys and values too are
    read from the cache: they are the same bytes when the sequence is resumed with another cut.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16; Hq a multiple of Hkv.
        cache: This layer's cache, already holding the rows' own tokens.
        block_table: [B, max_blocks] integer; entries past a sequence's end are not read.
        query_start_loc: [B + 1] integer; rows query_start_loc[b] .. query_start_loc[b + 1] - 1 are sequence b's.
        seq_lens: [B] integer, lengths with the rows' own tokens.
        scale: Factor of the scores.

    Returns:
        (output [T, Hq, D] in the query's dtype, log-sum-exp [T, Hq] float32). Rows of no sequence give 0 and
        -inf.

    Raises:
        ValueError: A shape, dtype, device, stride or (where it costs no sync) length is wrong.
    """
    if query.is_cuda:
        from kernels.kv_attention.triton_prefill import prefill_attention_triton as implementation
    else:
        implementation = attention_cpu
    return implementation(
        query,
        cache,
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        scale=scale,
    )
