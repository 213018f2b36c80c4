"""Position-keyed sampling: token = argmax(logits / T + Gumbel noise keyed by (seed, position)).

The one dispatcher: CUDA tensors go to the Triton kernels, float32 on a CPU with AVX-512 to ``sample.cpp``, all
others to the reference. It imports Triton on the first CUDA call, so a machine without Triton still
samples. All draw the same bits; logarithms, and so near ties, agree within rounding.
"""

import torch

from kernels.gumbel_sample.native import native_sample
from kernels.gumbel_sample.reference import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    check_arguments,
    gumbel_noise,
    gumbel_sample_reference,
    truncation_threshold,
)

__all__ = [
    "GUMBEL_MAX",
    "GUMBEL_MIN",
    "gumbel_noise",
    "gumbel_sample",
    "truncation_threshold",
]


def gumbel_sample(
    logits: torch.Tensor,
    *,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    threshold: torch.Tensor | None = None,
    lane: int = 0,
    draws: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row; see ``reference.gumbel_sample_reference`` for the full contract.

    Args:
        logits: [B, V] float32, bfloat16 or float16; any row stride, last dimension contiguous.
        seeds: [B] int64 in [0, 2**63).
        positions: [B] int64 >= 0, absolute index of the token being sampled.
        temperature: [B] float32; 0 is greedy.
        threshold: [B] float32 from ``truncation_threshold``, or None to keep every token.
        lane: Stream at this position, in [0, 2**32).
        draws: ([U] int64 rows, [B] int64 places among these), where the caller knows that rows have their seed and
            position in common, as siblings in a token tree do: row b's are those of row rows[places[b]]. Noise that
            is drawn into memory is then drawn once. Kernels draw it in registers: this has no effect on them.

    Returns:
        (tokens [B] int64, logprobs [B] float32).

    Raises:
        ValueError: A shape, dtype, device, stride or (where it costs no sync) range is wrong.
    """
    if logits.is_cuda:
        from kernels.gumbel_sample.triton import gumbel_sample_triton

        return gumbel_sample_triton(
            logits, seeds=seeds, positions=positions, temperature=temperature, threshold=threshold, lane=lane
        )
    is_plain = logits.device.type == "cpu" and logits.dtype == torch.float32
    if is_plain and (native := native_sample()) is not None:
        check_arguments(logits, seeds, positions, temperature, threshold, lane, with_ranges=False)
        drawn = native(logits, seeds, positions, temperature, threshold, lane)
        if drawn is not None:
            return drawn
        check_arguments(logits, seeds, positions, temperature, threshold, lane)
    return gumbel_sample_reference(
        logits, seeds=seeds, positions=positions, temperature=temperature, threshold=threshold, lane=lane, draws=draws
    )
