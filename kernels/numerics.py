"""What several kernels share: casts to e4m3 and int8, their scales, the activations, the order of tiles, their rows."""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-96)
"""Smallest scale of codes, zeros' too. Attention divides sums of P, up to 2^8 a key, by that of v: over 2^20 keys they
are then at most 2^124, which fits float32."""


@triton.jit
def at_most(x, limit):
    """Return min(x, limit) in float32. NaN stays NaN; on a GPU `tl.minimum` by default returns the limit instead."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """Return max(a, b) in float32, NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, limit):
    """Clamp a float32 to -limit..limit; NaN stays NaN."""
    return at_most(larger(x, -limit), limit)


@triton.jit
def to_e4m3(x):
    """Clamp to +-448, then cast: Triton's own cast gave NaN above 448 in some releases and saturates in others."""
    return clamp(x, E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def scale_of(amax):
    """Return the scale that maps amax to 448, at least SMALLEST_SCALE. NaN stays."""
    return larger(amax * (1.0 / 448.0), SMALLEST_SCALE)


@triton.jit
def to_int8(x):
    """Round to the nearest integer, ties to even, and clamp to +-127.

    For |x| below 2^22 the lowest bits of x + 1.5 * 2^23 are x rounded, in two's complement. One addition replaces a
    rounding and a conversion, which an SM computes at a quarter of the rate of additions or less.
    """
    return (clamp(x, 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def int8_scale_of(amax):
    """Return the scale that maps amax to 127, at least SMALLEST_SCALE. NaN stays."""
    return larger(amax * (1.0 / 127.0), SMALLEST_SCALE)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """Return max|x| of float32 over an axis, over all with None; NaN where x has one.

    tl.max of floats ignores NaN. The bits of magnitudes, as integers, have the order of the magnitudes, with NaN last.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + exp(-x)) in float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gelu7(x):
    """Compute a sigmoid(1.702 a), where a = min(x, 7)."""
    a = at_most(x, 7.0)
    return a * sigmoid(1.702 * a)


@triton.jit
def swiglu7(gate, up):
    """Compute a sigmoid(1.702 a) (b + 1), where a = min(gate, 7) and b = clamp(up, -7, 7)."""
    a = at_most(gate, 7.0)
    b = clamp(up, 7.0)
    return a * sigmoid(1.702 * a) * (b + 1.0)


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return (row tile, column tile) of a linear tile index.

    GROUP_M row tiles take turns at one column tile before the next, so that operands are read again from L2.
    """
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    place = tile % (GROUP_M * tiles_n)
    return first + place % rows, place // rows


@triton.jit
def load_rows(source, first, last, stride, k, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load [BLOCK_R, BLOCK_K] from row ``first``, column ``k``. Rows past ``last`` repeat it, columns past C are 0.

    Only the first row's offset is int64: the others are within 128 rows of at most 2^24 elements, which fits int32.
    """
    row = tl.minimum(tl.arange(0, BLOCK_R), last - first)
    column = k + tl.arange(0, BLOCK_K)
    at = source + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if C % BLOCK_K == 0:
        return tl.load(at)
    return tl.load(at, mask=(column < C)[None, :], other=0.0)
