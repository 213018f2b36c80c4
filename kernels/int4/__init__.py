"""INT4 weights: quantise them, multiply with them, and run a layer of experts on them.

The one dispatcher: CUDA tensors go to the Triton kernels, all others to the CPU implementation. It imports
Triton on the first CUDA call, so a machine without Triton still serves. ``reference.py`` draws the encoding.
"""

import torch

from kernels.int4 import cpu
from kernels.int4.checks import (
    check_linear,
    check_moe,
    check_packed,
    check_quantise,
)
from kernels.int4.reference import GROUP_SIZES, dequantise_reference

__all__ = [
    "GROUP_SIZES",
    "dequantise",
    "int4_linear",
    "int4_moe",
    "kernel_form",
    "quantise",
]

Form = tuple[torch.Tensor, torch.Tensor]


def quantise(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight matrix, or a stack of them, group by group along its last dimension.

    The bytes are the same on every device. On CUDA this waits for the device, to look at the scales.

    Args:
        weight: [..., N, K] float32, bfloat16 or float16, at least two dimensions.
        group_size: One of GROUP_SIZES, a divisor of K.

    Returns:
        packed: [..., N, K/2] uint8.
        scale: [..., N, K/G] bfloat16.

    Raises:
        ValueError: The dtype, shape or group size is wrong, or a weight is NaN or infinite.
    """
    check_quantise(weight, group_size)
    if weight.is_cuda:
        from kernels.int4.triton import quantise_triton

        return quantise_triton(weight, group_size)
    return cpu.quantise_cpu(weight, group_size)


def dequantise(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the values of canonical packed weights; exact in float32.

    Args:
        packed: [..., N, K/2] uint8.
        scale: [..., N, K/G] bfloat16.
        dtype: Of the result; the float32 value is rounded to it.

    Returns:
        [..., N, K].

    Raises:
        ValueError: A dtype, shape or device is wrong, or K/G implies no known group size.
    """
    check_packed(packed, scale)
    return dequantise_reference(packed, scale).to(dtype)


def kernel_form(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Form:
    """Return what the matmuls read on this device: two tensors, opaque to the caller.

    CUDA: the canonical tensors themselves, N K / 2 + 2 N K / G bytes. CPU, bfloat16: a copy in torch's own
    layout, N K / 2 + 4 N K / G bytes. CPU, float32: the canonical tensors, made dense in every call.

    Args:
        packed: [N, K/2] or [E, N, K/2] uint8.
        scale: [N, K/G] or [E, N, K/G] bfloat16.
        dtype: Of the activations that will meet these weights; bfloat16 alone on CUDA.

    Returns:
        The form of one matrix or of E of them; ``form[0][e], form[1][e]`` is the form of expert e.

    Raises:
        ValueError: A shape, dtype or device is wrong, a tensor is not contiguous, or, on the CPU in
            bfloat16, N is no multiple of 16.
    """
    check_packed(packed, scale, dtype)
    if packed.is_cuda or dtype == torch.float32:
        return packed, scale
    return cpu.kernel_form_cpu(packed, scale)


def int4_linear(x: torch.Tensor, form: Form, group_size: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W^T + bias, accumulated in float32.

    Args:
        x: [M, K], in the dtype the form was made for; any row stride, last dimension contiguous.
        form: Of W [N, K], from ``kernel_form``.
        group_size: Of W.
        bias: [N] in x.dtype, or None.

    Returns:
        [M, N] in x.dtype.

    Raises:
        ValueError: A shape, dtype, device, stride or the group size is wrong.
    """
    check_linear(x, form, group_size, bias)
    if x.is_cuda:
        from kernels.int4.triton import int4_linear_triton

        return int4_linear_triton(x, form, group_size, bias)
    return cpu.int4_linear_cpu(x, form, group_size, bias)


def int4_moe(
    x: torch.Tensor,
    w13_form: Form,
    w2_form: Form,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Return, per token, the weighted sum of its local experts: W2 (silu(gate) * up).

    The activation is rounded to x.dtype, each expert's result too; the sum over experts is float32. Under
    expert parallelism the result is this shard's part. Experts numbered outside the local range by the map,
    or outside [0, E) without one, contribute nothing; ids outside the map are the caller's fault.

    Args:
        x: [T, H], in the dtype the forms were made for; any row stride, last dimension contiguous.
        w13_form: Of [E, 2 I, H]; the gate's I rows come before the up projection's.
        w2_form: Of [E, H, I].
        topk_weights: [T, k] float32.
        topk_ids: [T, k] int32 or int64; experts of the whole model.
        expert_map: [experts of the whole model] int32 or int64: place among the E, -1 if elsewhere. None:
            ids are places.
        group_size: Of both weights.

    Returns:
        [T, H] in x.dtype.

    Raises:
        ValueError: A shape, dtype, device, stride or the group size is wrong.
    """
    check_moe(x, w13_form, w2_form, topk_weights, topk_ids, expert_map, group_size)
    if x.is_cuda:
        from kernels.int4.triton_moe import int4_moe_triton as implementation
    else:
        implementation = cpu.int4_moe_cpu
    return implementation(x, w13_form, w2_form, topk_weights, topk_ids, expert_map, group_size)
