"""Floats of 8 and 4 bits as the kernels load and make them.

From compute capability 8.9 on the hardware converts e4m3; Ampere does not, and Triton refuses the type
there. The bit patterns are simple enough for an exact path in integers that serves every GPU. Numbers
are rounded to e4m3 and e2m1 by integers everywhere: the bytes are those that torch writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kara_sglang.kernels.record import FP4_MAX, FP4_SHIFT

E2M1: tl.constexpr = tl.constexpr(tl.uint8)
"""How kernels are told of a ring in pairs of e2m1."""
_SCALE_PER_SIZE: tl.constexpr = tl.constexpr(2.0**FP4_SHIFT / FP4_MAX)
_SCALED_ONE: tl.constexpr = tl.constexpr(2.0**FP4_SHIFT)

NATIVE_E4M3 = (8, 9)
"""The first compute capability that converts e4m3."""


@triton.jit
def load_float(pointers, mask, STORED: tl.constexpr, NATIVE: tl.constexpr):
    """Load numbers of type ``STORED`` (float8e4nv and float8e5 as uint8); masked-out ones are 0.

    An 8-bit float becomes float16, exactly; e4m3 by the hardware where ``NATIVE``. An e4m3 NaN stays
    one there and becomes +-480 elsewhere: neither ring nor cache holds one unless the model itself
    computed it.
    """
    raw = tl.load(pointers, mask=mask, other=0)
    if tl.float8e4nv == STORED:
        if NATIVE:
            return raw.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        else:
            bits = raw.to(tl.uint16)
            # Same mantissa, moved up; the exponent's bias is 7 instead of float16's 15, hence 2**8.
            half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            return half.to(tl.float16, bitcast=True) * 256.0
    elif tl.float8e5 == STORED:
        return (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    else:
        return raw


@triton.jit
def power_of_two(exponent):
    """``2.0 ** exponent``, float32 and exact, for int32 from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def size_of(value):
    """``abs(value)`` of float32 as an int32 in the same order; NaN comes last."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def exponent_of(size, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """By which power of two numbers must be divided to fit e4m3, int32, from the largest of their
    :func:`size_of`.

    As :func:`kara_sglang.kernels.record.to_fp8` has it.
    """
    exponent = -((0x43E00000 - size) >> 23)  # log2(largest / 448), rounded up
    return tl.minimum(tl.maximum(exponent, LOWEST), HIGHEST)


@triton.jit
def to_e4m3(value):
    """The uint8 of ``value`` (float32) in e4m3: nearest, ties to even, clamped to +-448; NaN stays.

    Parameters and result have the same shape.
    """
    size = size_of(value)
    # 448 at most, 3 mantissa bits, a bias of 7. Below 2**-6 numbers are multiples of 2**-9, which
    # adding 2**14 leaves in float32's last bits.
    code = _rounded(size, 0x43E00000, 20, 120, 0x3C800000, 16384.0)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | (value.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.uint8)


@triton.jit
def _rounded(
    size,
    LARGEST: tl.constexpr,
    DROPPED: tl.constexpr,
    BIAS: tl.constexpr,
    NORMAL: tl.constexpr,
    MAGIC: tl.constexpr,
):
    """A float32's :func:`size_of` in a type of fewer bits, ties to even, int32.

    ``LARGEST`` of the type, mantissa bits ``DROPPED``, change of ``BIAS``, the type's least ``NORMAL``
    number, and a power of two whose last mantissa bit is the type's smallest number.
    """
    size = tl.minimum(size, LARGEST)
    normal = (size + ((1 << (DROPPED - 1)) - 1) + ((size >> DROPPED) & 1) - (BIAS << 23)) >> DROPPED
    tiny = size.to(tl.float32, bitcast=True) + MAGIC
    tiny = tiny.to(tl.int32, bitcast=True) & 0xFF
    return tl.where(size < NORMAL, tiny, normal)


@triton.jit
def scale_code(size):
    """The scale of numbers as :func:`kara_sglang.kernels.record.to_fp4` stores it, int32, from the
    largest of their :func:`size_of`."""
    scale = size.to(tl.float32, bitcast=True) * _SCALE_PER_SIZE
    return tl.maximum(_rounded(size_of(scale), 0x47700000, 20, 112, 0x38800000, 64.0), 1)


@triton.jit
def scale_of(code):
    """A stored scale, float16, from the last 8 bits of an integer."""
    return ((code & 0xFF) << 7).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def inverse_of(code):
    """By what numbers with a stored scale are multiplied to become e2m1, float32."""
    return tl.div_rn(_SCALED_ONE, scale_of(code).to(tl.float32))


@triton.jit
def to_e2m1(value):
    """Sign (0 or 1) and the other three bits of ``value`` (float32) in e2m1, int32: nearest, ties to
    even, clamped to +-6, which NaN becomes, too."""
    negative = (value.to(tl.int32, bitcast=True) >> 31) & 1
    return negative, _rounded(size_of(value), 0x40C00000, 22, 126, 0x3F800000, 4194304.0)


@triton.jit
def from_e2m1(raw):
    """The two numbers of each byte, divided by 8, float16; see
    :func:`kara_sglang.kernels.record.to_fp4`. Their products with any scale are exact in float16."""
    bits = raw.to(tl.uint16)
    first = (bits & 0x8E) << 8
    second = ((bits & 0x70) << 5) | ((bits & 1) << 15)
    # As they lie there they are float16s, but 2**14 times too small.
    return first.to(tl.float16, bitcast=True) * 2048.0, second.to(tl.float16, bitcast=True) * 2048.0
