"""Quantize rows of bf16 to int8 with a scale each, as they are or through a Hadamard of 64; rounding: docs/OPS.md.

A program walks rows in steps of the grid's size. It reads a row once, 16 bytes a lane, and keeps it in registers, 64
values a thread; the load of the next row is in flight meanwhile. Predicted for 64,256 rows, 2 bytes read and 1 written
per value, at 4.2 TB/s, the rate that `rmsnorm_quantize` reaches on an H200:

| rows of | GB | ms |
|---|---|---|
| 5,120 (proj's input) | 0.99 | 0.24 |
| 13,696 (down's, Hadamard) | 2.64 | 0.63 |

At that rate an SM has 2,070 cycles for a row of 13,696, padded to 16,384 values. The Hadamard is a product of [256, 64]
by a matrix of signs in bf16 on the tensor cores, exact but for the order of float32 sums. It takes 512 cycles beside
the rest; its 32 KB of bf16 take 256 cycles of shared memory. As six steps of additions it would take 768 cycles of the
pipe that also scales and rounds, and at least one round trip of 64 KB of float32 through shared memory, 1,024 cycles.
"""

import triton
import triton.language as tl

from happyhorse_fast.kernels.numerics import int8_scale_of, largest_magnitude, to_int8

HADAMARD = tl.constexpr(64)


@triton.jit
def hadamard_signs():
    """Return the Hadamard matrix of signs, [64, 64] bf16: (-1)^popcount(i & j)."""
    lane = tl.arange(0, HADAMARD)
    parity = lane[:, None] & lane[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return (1 - 2 * (parity & 1)).to(tl.float32).to(tl.bfloat16)


@triton.jit
def quantize_rows_kernel(
    x,
    codes,
    scale,
    rows,
    x_stride,
    K: tl.constexpr,
    HADAMARD_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write codes = x / scale of every row; x is [rows, K] bf16, rows ``x_stride`` apart, codes int8, contiguous."""
    if HADAMARD_ROWS:
        signs = hadamard_signs()
        group = tl.arange(0, BLOCK_K // HADAMARD)[:, None]
        at = group * HADAMARD + tl.arange(0, HADAMARD)[None, :]
        mask = (group < K // HADAMARD) & (at < K)
    else:
        at = tl.arange(0, BLOCK_K)
        mask = at < K
    one = tl.full((), 1, tl.int64)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        place = one * row
        values = tl.load(x + place * x_stride + at, mask=mask, other=0.0)
        if HADAMARD_ROWS:
            values = tl.dot(values, signs) * 0.125
        else:
            values = values.to(tl.float32)
        row_scale = int8_scale_of(largest_magnitude(values, None))
        tl.store(codes + place * K + at, to_int8(values * (1.0 / row_scale)), mask=mask)
        tl.store(scale + row, row_scale)
