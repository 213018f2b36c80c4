"""What the Triton attention kernels share: from the codes and scales of a tile of tokens to softmax weights.

Owns the arithmetic of a tile; knows neither grids nor which rows a program serves.

Codes meet the tensor cores as float16, which holds them exactly. The query becomes float16 too, after division
by a power of two that brings its largest element into [1, 2): exact but for elements below 2**-17 of it. The
key's scale multiplies the scores, the value's scale the weights, so no dequantised element is ever stored.
A float32 query keeps float32 throughout, which is exact and slow.

Softmax is online (Milakov and Gimelshein, 2018) and in base 2. The running maximum is not that of the scores but
of score + log2(value scale), roughly: so the products weight * value scale, which must fit float16, stay near 1.
"""

# Kernel parameters are pointers and compile-time values, for which Python has no annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# 0x6400 + n is the float16 1024 + n, and n = code + 128 is the code with its sign bit turned over. Permuting bytes
# and subtracting 1152 therefore converts exactly, with half the instructions of int8 to float16 conversions.
_FOUR_CODES = tl.constexpr(
    """{
    .reg .b32 flipped, offset;
    xor.b32 flipped, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, flipped, 0x64646464, 0x4140;
    prmt.b32 $1, flipped, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
    }"""
)
# Output i is a pair: the codes in byte i of the first word and of the second. 0x6a is (a & b) ^ c.
_TWO_WORDS = tl.constexpr(
    """{
    .reg .b32 mask, offset;
    mov.b32 mask, 0x00ff00ff;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, $4, $5, 0x4400;
    prmt.b32 $1, $4, $5, 0x5511;
    prmt.b32 $2, $4, $5, 0x6622;
    prmt.b32 $3, $4, $5, 0x7733;
    lop3.b32 $0, $0, mask, offset, 0x6a;
    lop3.b32 $1, $1, mask, offset, 0x6a;
    lop3.b32 $2, $2, mask, offset, 0x6a;
    lop3.b32 $3, $3, mask, offset, 0x6a;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
    sub.f16x2 $2, $2, offset;
    sub.f16x2 $3, $3, offset;
    }"""
)


@triton.jit
def codes_to_float(codes, DTYPE: tl.constexpr):
    """Return int8 codes as DTYPE (float16 or float32), exactly."""
    if _IS_INTERPRETED or DTYPE == tl.float32:
        return codes.to(DTYPE)
    else:
        return tl.inline_asm_elementwise(_FOUR_CODES, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def words_to_floats(words, DTYPE: tl.constexpr):
    """Return the codes in bytes 0, 1, 2 and 3 of int32 words as four tensors of DTYPE, exactly."""
    if _IS_INTERPRETED or DTYPE == tl.float32:
        return (
            (words << 24 >> 24).to(DTYPE),
            (words << 16 >> 24).to(DTYPE),
            (words << 8 >> 24).to(DTYPE),
            (words >> 24).to(DTYPE),
        )
    else:
        return tl.inline_asm_elementwise(
            _TWO_WORDS,
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def normalise_query(query):
    """Return (query / 2**e, 2**e): float16 with a largest element in [1, 2), or float32 and 1 as it was."""
    if query.dtype == tl.float32:
        return query, 1.0
    else:
        query = query.to(tl.float32)
        largest = tl.maximum(tl.max(tl.max(tl.abs(query), 1), 0), 1e-30)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        return (query * (1.0 / power)).to(tl.float16), power


@triton.jit
def find_slots(tokens, table_ptr, BLOCK_SIZE: tl.constexpr):
    """Return (block int64, offset in it) of the tokens of the sequence whose row of the table starts at table_ptr."""
    # Unsigned: a signed quotient takes several instructions more.
    tokens = tokens.to(tl.uint32)
    block = tl.load(table_ptr + tokens // BLOCK_SIZE).to(tl.int64)
    return block, (tokens % BLOCK_SIZE).to(tl.int32)


@triton.jit
def weigh(scores, value_scale, maximum):
    """Take one step of online softmax.

    Args:
        scores: [ROWS, TILE] float32 in base 2, -inf where hidden.
        value_scale: [TILE] float32 >= 0.
        maximum: [ROWS] running maximum of score + about log2(value scale).

    Returns:
        (weights [ROWS, TILE], at most 1.07 after multiplication by value_scale; factor [ROWS] of what was
        accumulated before; new maximum).
    """
    # A zero vector's scale is 0; its codes are too, so any other scale serves.
    value_scale = tl.maximum(value_scale, 1e-18)
    # Bits read as an integer are log2 but for at most 0.087 less, in two instructions.
    log_scale = value_scale.to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 8388608.0) - 127.0
    new_maximum = tl.maximum(maximum, tl.max(scores + log_scale[None, :], 1))
    # A row that has seen nothing yet would otherwise take -inf - -inf.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    return tl.exp2(scores - shift[:, None]), tl.exp2(maximum - shift), new_maximum
