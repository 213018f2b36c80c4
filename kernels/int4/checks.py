"""What callers of INT4 operations may pass: each check raises ValueError with what, got and expected.

Reads shapes, dtypes, strides and devices, never values, so no check waits for a device.
"""

import torch

from kernels.int4.reference import GROUP_SIZES

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int32, torch.int64)

Form = tuple[torch.Tensor, torch.Tensor]


def check_quantise(weight: torch.Tensor, group_size: int) -> None:
    """Check the arguments of ``quantise``."""
    if weight.dim() < 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [..., N, K]")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight: got {weight.dtype}, expected one of {WEIGHT_DTYPES}")
    _check_group_size(group_size, weight.shape[-1])


def check_packed(packed: torch.Tensor, scale: torch.Tensor, activations: torch.dtype | None = None) -> None:
    """Check canonical tensors; with the dtype of their activations, also that a matmul can be made of them."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed: got {packed.dtype}, expected torch.uint8")
    if scale.dtype != torch.bfloat16:
        raise ValueError(f"scale: got {scale.dtype}, expected torch.bfloat16")
    if packed.dim() < 2 or packed.shape[:-1] != scale.shape[:-1]:
        raise ValueError(
            f"packed, scale: got shapes {tuple(packed.shape)} and {tuple(scale.shape)},"
            " expected [..., N, K/2] and [..., N, K/G]"
        )
    num_in, num_groups = 2 * packed.shape[-1], scale.shape[-1]
    if num_groups == 0 or num_in % num_groups or num_in // num_groups not in GROUP_SIZES:
        raise ValueError(f"scale: got {num_groups} groups of {num_in} features, expected groups of {GROUP_SIZES}")
    if scale.device != packed.device:
        raise ValueError(f"scale: got device {scale.device}, expected {packed.device} as packed")
    if activations is None:
        return
    if packed.dim() > 3:
        raise ValueError(f"packed: got shape {tuple(packed.shape)}, expected [N, K/2] or [E, N, K/2]")
    if not packed.is_contiguous() or not scale.is_contiguous():
        raise ValueError(f"packed, scale: got strides {packed.stride()} and {scale.stride()}, expected contiguous")
    _check_activations("dtype", activations, packed.device)


def check_linear(x: torch.Tensor, form: Form, group_size: int, bias: torch.Tensor | None) -> None:
    """Check the arguments of ``int4_linear``."""
    num_out, num_in = _check_form("form", form, group_size, x, num_experts=None)
    _check_rows("x", x, num_in)
    if bias is not None:
        _check_like("bias", bias, (num_out,), (x.dtype,), x.device)


def check_moe(
    x: torch.Tensor,
    w13_form: Form,
    w2_form: Form,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    group_size: int,
) -> None:
    """Check the arguments of ``int4_moe``."""
    num_experts = w13_form[0].shape[0]
    twice_width, hidden = _check_form("w13_form", w13_form, group_size, x, num_experts)
    num_out, width = _check_form("w2_form", w2_form, group_size, x, num_experts)
    if (num_out, 2 * width) != (hidden, twice_width):
        raise ValueError(
            f"w2_form: got a form of [{num_out}, {width}], expected [{hidden}, {twice_width / 2:g}] for w13_form"
        )
    _check_rows("x", x, hidden)
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids.shape)}, expected [{x.shape[0]}, k] with k > 0")
    _check_like("topk_ids", topk_ids, tuple(topk_ids.shape), ID_DTYPES, x.device)
    _check_like("topk_weights", topk_weights, tuple(topk_ids.shape), (torch.float32,), x.device)
    if expert_map is not None:
        _check_like("expert_map", expert_map, (expert_map.numel(),), ID_DTYPES, x.device)


def _check_group_size(group_size: int, num_in: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: got {group_size}, expected one of {GROUP_SIZES}")
    if num_in % group_size:
        raise ValueError(f"group_size: got {group_size}, expected a divisor of the {num_in} input features")


def _check_activations(name: str, dtype: torch.dtype, device: torch.device) -> None:
    legal = (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32)
    if dtype not in legal:
        raise ValueError(f"{name}: got {dtype}, expected one of {legal} on {device.type}")


def _check_form(name: str, form: Form, group_size: int, x: torch.Tensor, num_experts: int | None) -> tuple[int, int]:
    """Return (N, K) of a form that fits x's dtype and device."""
    packed, second = form
    leading = () if num_experts is None else (num_experts,)
    _check_activations("x", x.dtype, x.device)
    if packed.dim() != 2 + len(leading) or packed.shape[:-2] != leading:
        raise ValueError(f"{name}: got packed {tuple(packed.shape)}, expected {[*leading, 'N', 'K/2']}")
    num_out, num_in = packed.shape[-2], 2 * packed.shape[-1]
    _check_group_size(group_size, num_in)
    num_groups = num_in // group_size
    is_canonical = x.is_cuda or x.dtype == torch.float32
    expected = (*leading, num_out, num_groups) if is_canonical else (*leading, num_groups, num_out, 2)
    if tuple(second.shape) != expected:
        raise ValueError(
            f"{name}: got second tensor {tuple(second.shape)}, expected {expected}, as kernel_form makes it for"
            f" {x.dtype} on {x.device.type} and group size {group_size}"
        )
    _check_like(name, packed, tuple(packed.shape), (torch.uint8,), x.device)
    _check_like(name, second, expected, (torch.bfloat16,), x.device)
    if not packed.is_contiguous() or not second.is_contiguous():
        raise ValueError(f"{name}: got strides {packed.stride()} and {second.stride()}, expected contiguous tensors")
    return num_out, num_in


def _check_rows(name: str, rows: torch.Tensor, width: int) -> None:
    if rows.dim() != 2 or rows.shape[1] != width:
        raise ValueError(f"{name}: got shape {tuple(rows.shape)}, expected [rows, {width}]")
    if rows.stride(1) != 1 and width > 1:
        raise ValueError(f"{name}: got strides {rows.stride()}, expected a contiguous last dimension")


def _check_like(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: got {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {device} as x")
