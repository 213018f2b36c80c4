"""Plain float32 torch for INT4 weights: the definition of the encoding and of the operations on it.

Owns what a packed weight means and what the CPU and Triton implementations are tested against; knows
nothing of devices' layouts, engines or checkpoints.

A weight matrix [N, K] (N output features, K input features) is cut along K into groups of G elements.
A group keeps one bfloat16 scale = absmax / 7 (1 where that is 0, so that its codes are 0), and each
element the code round(w / scale), half to even, in [-8, 7]; -8 only comes of scales so small that they
are subnormal. The value of a code is float32(code) * float32(scale), which is exact. A nibble holds
code + 8, and a byte the element j of its group (low) and the element j + G/2 (high), so that either
nibble of a run of bytes is a run of the input features:

    row n of the matrix    | group 0           | group 1           | ...   K / G groups
                           /                    \
    elements of a group    e0 e1 ... e(G/2-1) | e(G/2) ... e(G-1)
                           |  |                 |
    bytes of the group     byte 0 = (e(G/2) + 8) << 4 | (e0 + 8)
                           byte 1 = (e(G/2+1) + 8) << 4 | (e1 + 8)
                           ...
                           byte G/2-1 = (e(G-1) + 8) << 4 | (e(G/2-1) + 8)

    packed uint8    [..., N, K/2]   groups in order, G/2 bytes each
    scale bfloat16  [..., N, K/G]

Shape legend: E experts, T tokens, k experts a token, H hidden size, I width of an expert.

Sources: symmetric group-wise round-to-nearest as in Dettmers and Zettlemoyer, "The case for 4-bit
precision: k-bit inference scaling laws" (2023). SwiGLU is from Shazeer, "GLU variants improve
transformer" (2020).
"""

import torch

GROUP_SIZES = (32, 64, 128)
MAX_CODE = 7
MIN_CODE = -8
ZERO_NIBBLE = 8


def quantise_reference(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [..., N, K]; see the module docstring for the result and ``quantise`` for the contract."""
    groups = weight.float().unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1) / MAX_CODE).to(torch.bfloat16)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (groups / scale.float()[..., None]).round().clamp(MIN_CODE, MAX_CODE)
    low, high = (codes + ZERO_NIBBLE).to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).flatten(-2), scale


def dequantise_reference(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the values [..., N, K] of packed weights, float32."""
    nibbles = packed.unflatten(-1, (scale.shape[-1], -1))
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float().sub_(ZERO_NIBBLE)
    return codes.mul_(scale.float()[..., None]).flatten(-2)


def int4_linear_reference(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x [M, K] @ W^T + bias, [M, N] float32, for packed W [N, K]."""
    y = x.float() @ dequantise_reference(packed, scale).T
    return y if bias is None else y + bias.float()


def int4_moe_reference(
    x: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return, per token, the sum over its local experts of weight * W2 (silu(gate) * up), float32.

    Args:
        x: [T, H].
        w13: Packed [E, 2 I, H]; the gate's I rows come before the up projection's.
        w2: Packed [E, H, I].
        topk_weights: [T, k] float32.
        topk_ids: [T, k] integer, expert numbers before the map.
        expert_map: [experts] integer: place among the E, or -1 for one that is not here. None: no map.

    Returns:
        [T, H] float32.
    """
    local_ids = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()]
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(w13[0])):
        token, slot = (local_ids == expert).nonzero(as_tuple=True)
        gate, up = int4_linear_reference(x[token], w13[0][expert], w13[1][expert]).chunk(2, dim=-1)
        y = int4_linear_reference(torch.nn.functional.silu(gate) * up, w2[0][expert], w2[1][expert])
        output.index_add_(0, token, y * topk_weights[token, slot, None])
    return output
