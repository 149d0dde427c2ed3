"""Elementary functions of the CPU kernels: branch-free, so that loops over channels become vector instructions.

Numba would call the scalar exp of the C library for every element. Here 2^x is a polynomial on [-1/2, 1/2] (relative
error 2e-7, exactly 1 at 0, so that a decay of nothing leaves a state unchanged) and an addition to the exponent's bits.
"""

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

f32 = np.float32
LOG2E = f32(1.4426950408889634)
LN2 = f32(0.6931471805599453)
# Not reassociation: the rounding trick of exp2 would be optimised away, and sums keep their order.
FASTMATH = {"contract", "nnan", "ninf", "nsz", "arcp"}
_ROUND = f32(1.5 * 2**23)  # added to a small float32, leaves its nearest integer in the low bits


@intrinsic
def float_from_bits(typingctx, bits):
    """Read a 32-bit integer as the float32 of the same bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@intrinsic
def bits_from_float(typingctx, value):
    """The bits of a float32 as a 32-bit integer."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), codegen


@numba.njit(inline="always", fastmath=FASTMATH)
def exp2_nonpositive(x):
    """2^x for x <= 0 in float32 (right up to 126); below -126, 2^-126."""
    x = max(x, f32(-126.0))
    shifted = x + _ROUND
    r = x - (shifted - _ROUND)
    p = f32(0.001326472731307149)
    p = p * r + f32(0.009671512991189957)
    p = p * r + f32(0.05550733581185341)
    p = p * r + f32(0.24022242426872253)
    p = p * r + f32(0.6931470036506653)
    p = p * r + f32(1.0)
    return float_from_bits(bits_from_float(p) + (bits_from_float(shifted) << np.int32(23)))


@numba.njit(inline="always", fastmath=FASTMATH)
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)); the logarithm by the series of 2 artanh(t / (2 + t))."""
    t = exp2_nonpositive(-abs(x) * LOG2E)
    s = t / (f32(2.0) + t)
    q = s * s
    p = f32(2.0 / 13.0)
    p = p * q + f32(2.0 / 11.0)
    p = p * q + f32(2.0 / 9.0)
    p = p * q + f32(2.0 / 7.0)
    p = p * q + f32(2.0 / 5.0)
    p = p * q + f32(2.0 / 3.0)
    p = p * q + f32(2.0)
    return max(x, f32(0.0)) + p * s


@numba.njit(inline="always", fastmath=FASTMATH)
def silu(x):
    """x * sigmoid(x), from exp(-|x|)."""
    t = exp2_nonpositive(-abs(x) * LOG2E)
    numerator = f32(1.0) if x >= f32(0.0) else t
    return x * numerator / (f32(1.0) + t)


def load(value):
    """A kernel array's element as float32: float32 itself, or uint16 holding bfloat16."""


@overload(load, inline="always")
def _load(value):
    if isinstance(value, types.Integer):
        return lambda value: float_from_bits(np.int32(value) << np.int32(16))
    return lambda value: value


def rounded(array, value):
    """A float32 as an element of `array`: itself, or rounded to the nearest bfloat16, ties to even."""


@overload(rounded, inline="always")
def _rounded(array, value):
    if isinstance(array.dtype, types.Integer):

        def to_bfloat16(array, value):
            bits = bits_from_float(value)
            if (bits & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000):  # not a number: rounding up could make it one
                return np.uint16(0x7FC0)
            return np.uint16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))

        return to_bfloat16
    return lambda array, value: value
