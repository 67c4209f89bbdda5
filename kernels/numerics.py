"""Arithmetic that several kernels share: casts to e4m3 and int8, and the two activations."""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)
"""Below it 1 / scale may be infinite in float32."""


@triton.jit
def at_most(x, limit):
    """min(x, limit) of float32; NaN stays, which `tl.minimum` alone leaves out on a GPU."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, limit):
    """x between -limit and limit, of float32; NaN stays."""
    return at_most(tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL), limit)


@triton.jit
def to_e4m3(x):
    """Clamp to +-448, then cast: e4m3 casts changed from NaN to saturation between releases; rely on neither."""
    return clamp(x, E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def scale_of(amax):
    """Scale that maps amax to 448; 1 where that is below 2^-126 and 1 / scale may be infinite. NaN stays."""
    scale = amax * (1.0 / 448.0)
    return tl.where(scale < SMALLEST_SCALE, 1.0, scale)


@triton.jit
def to_int8(x):
    """Round to the nearest integer, ties to even, and clamp to +-127.

    Below 2^22 in magnitude, x + 1.5 * 2^23 is an integer whose lowest bits are those of x rounded, in two's complement:
    an addition in place of a rounding and a conversion, of which an SM has a quarter or less of the additions' rate.
    """
    return (clamp(x, 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def int8_scale_of(amax):
    """Scale that maps amax to 127; 1 where that is below 2^-126 and 1 / scale may be infinite. NaN stays."""
    scale = amax * (1.0 / 127.0)
    return tl.where(scale < SMALLEST_SCALE, 1.0, scale)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """max|x| of float32 over an axis, or over all with None; NaN where there is one.

    Magnitudes are ordered as their bits are, with NaN above all; tl.max of floats leaves it out.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gelu7(x):
    """a sigmoid(1.702 a), a = min(x, 7)."""
    a = at_most(x, 7.0)
    return a * sigmoid(1.702 * a)


@triton.jit
def swiglu7(gate, up):
    """a sigmoid(1.702 a) (b + 1), a = min(gate, 7), b = clamp(up, -7, 7)."""
    a = at_most(gate, 7.0)
    b = clamp(up, 7.0)
    return a * sigmoid(1.702 * a) * (b + 1.0)


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of a linear tile index: GROUP_M row tiles side by side per column tile, so that operands stay in L2."""
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    place = tile % (GROUP_M * tiles_n)
    return first + place % rows, place // rows
