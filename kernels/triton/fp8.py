"""8-bit floats as the kernels load and make them.

From compute capability 8.9 on the hardware converts e4m3; Ampere does not, and Triton refuses the type
there. The bit patterns are simple enough for an exact path in integers that serves every GPU. Numbers
are rounded to e4m3 by integers everywhere: the bytes are those that torch writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    is_nan = size > 0x7F800000
    size = tl.where(size < 0x43E00000, size, 0x43E00000)  # 448.0
    # From 2**-6 on: drop 20 mantissa bits with rounding, and change the bias from 127 to 7.
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    # Below: adding 2**14 leaves multiples of 2**-9, the smallest e4m3, in float32's last bits.
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, tiny, normal)  # 2**-6
    return (tl.where(is_nan, 0x7F, code) | sign).to(tl.uint8)
