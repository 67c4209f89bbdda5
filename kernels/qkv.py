"""RMSNorm with quantisation, and the QKV product with its epilogue; docs/OPS.md states tensors, layouts and rounding.

A program of the product computes tiles of 128 rows by one head, on sm_90 by two. So QK-norm, rotation, gate and
quantisation run on the accumulator, one head after the other. The grid is persistent: programs walk all tiles in steps
of the grid's size. (Fusing that loop with the reduction, by tl.range's `flatten`, does not compile around an epilogue
with branches in Triton 3.7.1.)

Predicted for 64,256 rows of the 15B model on an H100 (peaks 1979 fp8, 989 bf16 TFLOP/s, 3.35 TB/s), each operand and
result moved once:

| kernel | TFLOP | ms at peak, 8 bits / bf16 | GB 8 bits / bf16 | ms of memory, 8 bits / bf16 |
|---|---|---|---|---|
| rmsnorm_quantize, with a branch | 0 | 0 | 3.62 / 3.95 | 1.08 / 1.18 |
| qkv_linear | 4.80 | 2.43 / 4.85 | 0.87 / 1.70 | 0.26 / 0.51 |

Norm and product in one kernel took 19.2 ms on an H200, the two here 8.6 (docs/decisions/0013-*.md). In one kernel every
column tile reads its row tile again, 57 times in all, and norms it again. That is 75 GB of float32 through L2 rather
than 37.5 of bf16 or 18.8 of codes.

With two heads a tile, half of the last tile of 57 heads is computed in vain, 1.8 % more FLOP. But each operand byte
from L2 serves 171 FLOP rather than 128: 28.6 GB instead of 37.5 in fp8, 57.2 instead of 75.0 in bf16. On an H200 at
700 W, where the products alone take 3.68 and 7.15 ms, 4.0 ms instead of 4.38 were predicted in fp8 and 7.6 instead of
8.09 in bf16; docs/kernels/qkv.md has the measured times.

The epilogue reads 64 KB of cosines and sines per tile of q and k, 1.6 GB from L2 in all, as float32.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from happyhorse_fast.kernels.numerics import (
    grouped_tile,
    int8_scale_of,
    largest_magnitude,
    load_rows,
    scale_of,
    sigmoid,
    to_e4m3,
    to_int8,
)
from happyhorse_fast.kernels.qkv_heads import Results, Scales, heads_of

EPS = tl.constexpr(1e-6)
ROTATED = tl.constexpr(32)
"""Channels that are rotated at once."""


class Tile(NamedTuple):
    """A tile's expert and rows: the first, and the end of those that exist."""

    expert: Any
    first: Any
    end: Any


@triton.jit
def rmsnorm_quantize_kernel(
    hidden,
    branch,
    norm_weight,
    row_tiles,
    x,
    scale,
    hidden_stride,
    branch_stride,
    C: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    FP8: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the branch, normalise, and round or quantise BLOCK_M whole rows, in one pass over hidden.

    The grid is (ROW_TILE / BLOCK_M, entries of row_tiles).
    """
    part = tl.program_id(0)
    entry = row_tiles + 3 * tl.program_id(1)
    expert = tl.load(entry)
    row = tl.load(entry + 1) + part * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_C)
    live = row < tl.load(entry + 2)
    mask = live[:, None] & (column < C)[None, :]
    place = row.to(tl.int64)[:, None]
    at = hidden + place * hidden_stride + column[None, :]
    h = tl.load(at, mask=mask, other=0.0)
    if HAS_BRANCH:
        h += tl.load(branch + place * branch_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(at, h, mask=mask)
    weight = tl.load(norm_weight + expert * C + column, mask=column < C, other=0.0)
    inverse = tl.rsqrt(tl.sum(h * h, 1) / C + EPS)
    y = h * inverse[:, None] * (weight + 1.0)[None, :]
    out = x + place * C + column[None, :]
    if FP8:
        row_scale = scale_of(largest_magnitude(y, 1))
        tl.store(out, to_e4m3(y * (1.0 / row_scale)[:, None]), mask=mask)
        tl.store(scale + row, row_scale, mask=live)
    elif INT8:
        row_scale = int8_scale_of(largest_magnitude(y, 1))
        tl.store(out, to_int8(y * (1.0 / row_scale)[:, None]), mask=mask)
        tl.store(scale + row, row_scale, mask=live)
    else:
        tl.store(out, y.to(tl.bfloat16), mask=mask)


@triton.jit
def rotate(x, phase, live, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rotate pairs of adjacent channels; ``phase`` points at the tile's first row of cos_sin.

    Split and join move no data: in the tensor core's layout one thread holds both channels of a pair. The compiler then
    converts both halves, through shared memory, to the layout in which the phases are loaded. Pieces of ROTATED
    channels keep fewer phases in registers beside the tile's other head: without pieces ten of the sm_90 kernels spill.
    """
    if COLUMNS > ROTATED:
        left, right = tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, COLUMNS // 2)), (0, 2, 1)))
        left = rotate(left, phase, live, COLUMNS // 2, D, BLOCK_M)
        right = rotate(right, phase + COLUMNS // 4, live, COLUMNS // 2, D, BLOCK_M)
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, COLUMNS))
    else:
        at = phase + tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, COLUMNS // 2)[None, :]
        cos = tl.load(at, mask=live, other=0.0)
        sin = tl.load(at + D // 2, mask=live, other=0.0)
        a, b = tl.split(tl.reshape(x, (BLOCK_M, COLUMNS // 2, 2)))
        return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_M, COLUMNS))


@triton.jit
def store_rows(out, value, tile, live, index, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Store a tile of one head into [N, HEADS, D]."""
    place = out + (tile.first.to(tl.int64) * HEADS + index) * D
    offset = tl.arange(0, BLOCK_M)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(place + offset, value, mask=live)


@triton.jit
def store_v_codes(out, product, tile, live, index, heads: tl.constexpr, BLOCK_M: tl.constexpr):
    """Quantise a tile of v by its own maximum, and store it transposed, in fragment order; rows past its end are 0."""
    D: tl.constexpr = heads.d
    held = tl.where(live, product, 0.0)
    # One reduction over both axes: as one over each axis, Triton 3.7.1 fails to compile for sm_100.
    scale = scale_of(largest_magnitude(held, None))
    codes = to_e4m3(held * (1.0 / scale))
    # Token 8 i + 2 t + b of 16 goes to place 4 t + 2 i + b, so that a thread stores 16 tokens of a channel at once.
    codes = tl.permute(tl.reshape(codes, (BLOCK_M // 16, 2, 4, 2, D)), (0, 2, 1, 3, 4))
    slots = out.blocks * BLOCK_M
    block = tile.first // BLOCK_M
    place = out.v + (index * D).to(tl.int64) * slots + block * BLOCK_M
    tl.store(place + tl.arange(0, D)[None, :] * slots + tl.arange(0, BLOCK_M)[:, None], tl.reshape(codes, (BLOCK_M, D)))
    tl.store(out.v_scale + index * out.blocks + block, scale)


@triton.jit
def store_q_codes(out, y, tile, live, index, heads: tl.constexpr, BLOCK_M: tl.constexpr):
    """Quantise every row of a tile of q to int8 by its own maximum."""
    scale = int8_scale_of(largest_magnitude(y, 1))[:, None]
    store_rows(out.q, to_int8(y * (1.0 / scale)), tile, live, index, heads.q, heads.d, BLOCK_M)
    place = out.q_scale + tile.first.to(tl.int64) * heads.q
    tl.store(place + (tl.arange(0, BLOCK_M)[:, None] * heads.q + index), scale, mask=live)


@triton.jit
def store_k_codes(out, y, tile, live, index, heads: tl.constexpr, BLOCK_M: tl.constexpr):
    """Quantise a tile of k to int8 by its own maximum, over rows before its end."""
    held = tl.where(live, y, 0.0)
    scale = int8_scale_of(largest_magnitude(held, None))  # one reduction, as for v
    store_rows(out.k, to_int8(y * (1.0 / scale)), tile, live, index, heads.kv, heads.d, BLOCK_M)
    tl.store(out.k_scale + index * out.blocks + tile.first // BLOCK_M, scale)


@triton.jit
def store_head(product, factor, head, tile, scales, cos_sin, out, heads: tl.constexpr, BLOCK_M: tl.constexpr):
    """Finish and store one head of the product, by its kind: q, k, v or gates. ``factor``: the scales of x's rows."""
    D: tl.constexpr = heads.d
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, D)
    live = (row < tile.end - tile.first)[:, None]
    if heads.codes:
        # A new name: Triton keeps a variable's type over a run-time branch, and the product of int8 is int32.
        scaled = product.to(tl.float32) * factor[:, None]
        scaled *= tl.load(scales.weight + (tile.expert * heads.all + head) * D + column)[None, :]
    else:
        scaled = product.to(tl.bfloat16).to(tl.float32)
    if head < heads.rotated:
        which = tile.expert * 2 + (head >= heads.q).to(tl.int32)
        norm = tl.load(scales.norm + which * D + column) + 1.0
        inverse = tl.rsqrt(tl.sum(scaled * scaled, 1) / D + EPS)
        phase = cos_sin + tile.first.to(tl.int64) * D
        y = rotate(scaled * inverse[:, None] * norm[None, :], phase, live, D, D, BLOCK_M)
        if heads.int8_qk:
            if head < heads.q:
                store_q_codes(out, y, tile, live, head, heads, BLOCK_M)
            else:
                store_k_codes(out, y, tile, live, head - heads.q, heads, BLOCK_M)
        else:
            if heads.fp8_v:
                scale = tl.load(scales.qk + which)
                value = to_e4m3(y * (1.0 / scale))
                if head == 0:
                    tl.store(out.q_scale + tile.first // BLOCK_M, scale)
                elif head == heads.q:
                    tl.store(out.k_scale + tile.first // BLOCK_M, scale)
            else:
                value = y.to(tl.bfloat16)
            if head < heads.q:
                store_rows(out.q, value, tile, live, head, heads.q, D, BLOCK_M)
            else:
                store_rows(out.k, value, tile, live, head - heads.q, heads.kv, D, BLOCK_M)
    elif head < heads.gates:
        if heads.fp8_v:
            store_v_codes(out, scaled, tile, live, head - heads.rotated, heads, BLOCK_M)
        else:
            store_rows(out.v, scaled.to(tl.bfloat16), tile, live, head - heads.rotated, heads.kv, D, BLOCK_M)
    else:
        gate = (head - heads.gates) * D + column
        place = out.gate + tile.first.to(tl.int64) * heads.q
        mask = live & (gate < heads.q)[None, :]
        tl.store(place + (row[:, None] * heads.q + gate[None, :]), sigmoid(scaled), mask=mask)


@triton.jit
def store_heads(
    product,
    factor,
    head,
    tile,
    scales,
    cos_sin,
    out,
    heads: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Run the epilogue on TILE_HEADS heads of the product; with RAGGED the last ones may lie past its end.

    Heads are finished one after the other: scaled, normed and quantised together, two heads of 128 spill 72 to 496
    bytes. Only RAGGED tests whether a head exists: Triton 3.6.0 cannot read an accumulator of sm_100 for the first time
    inside a condition.
    """
    if TILE_HEADS > 1:
        # In the tensor core's layout this split only chooses registers: no data moves.
        PART: tl.constexpr = TILE_HEADS // 2
        left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, PART * heads.d)), (0, 2, 1)))
        store_heads(left, factor, head, tile, scales, cos_sin, out, heads, BLOCK_M, PART, RAGGED)
        store_heads(right, factor, head + PART, tile, scales, cos_sin, out, heads, BLOCK_M, PART, RAGGED)
    elif RAGGED:
        if head < heads.all:
            store_head(product, factor, head, tile, scales, cos_sin, out, heads, BLOCK_M)
    else:
        store_head(product, factor, head, tile, scales, cos_sin, out, heads, BLOCK_M)


@triton.jit
def qkv_linear_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    qk_norm,
    cos_sin,
    row_tiles,
    qk_scale,
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    gate,
    tiles,
    x_stride,
    blocks,
    C: tl.constexpr,
    D: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    CODES: tl.constexpr,
    INT8: tl.constexpr,
    INT8_QK: tl.constexpr,
    FP8_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute x . weight, BLOCK_N // 128 heads a tile, and run its epilogue.

    x and weight are pointers, or TMA descriptors with DESCRIPTORS. With CODES the operands have scales; with INT8 they
    are int8, else e4m3. Sums of int8 are exact, in int32.

    e4m3 accumulates in the tensor core over all of C, Triton's default; only hardware shows what that costs in
    accuracy. Promoting sums to float32 every 128 channels took 163 registers instead of 102 in a smaller kernel, and
    this one has 255 of 255 without it. max_num_imprecise_acc=0 silently leaves the fp8 tensor cores.
    """
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    heads: tl.constexpr = heads_of(HQ, HKV, D, CODES, INT8_QK, FP8_V)
    TILE_HEADS: tl.constexpr = BLOCK_N // 128
    COLUMN_TILES: tl.constexpr = (heads.all + TILE_HEADS - 1) // TILE_HEADS
    WIDTH: tl.constexpr = TILE_HEADS * D
    scales = Scales(x_scale, weight_scale, qk_norm, qk_scale)
    out = Results(q, k, v, q_scale, k_scale, v_scale, gate, blocks)
    # disable_licm: values that do not depend on the tile, mostly row offsets, would take registers throughout the loop.
    for item in tl.range(tl.program_id(0), tiles * COLUMN_TILES, tl.num_programs(0), disable_licm=True):
        m, n = grouped_tile(item, tiles, COLUMN_TILES, GROUP_M)
        head = n * TILE_HEADS
        expert = tl.load(row_tiles + 3 * m)
        first = tl.load(row_tiles + 3 * m + 1)
        end = tl.load(row_tiles + 3 * m + 2)
        feature = (expert * heads.all + head) * D
        last = (expert + 1) * (heads.all * D) - 1
        product = tl.zeros((BLOCK_M, WIDTH), SUM)
        for at in tl.range(0, C, BLOCK_K):
            if DESCRIPTORS:
                a = x.load([first, at])
                b = weight.load([feature, at])
            else:
                a = load_rows(x, first, end - 1, x_stride, at, C, BLOCK_M, BLOCK_K)
                b = load_rows(weight, feature, last, C, at, C, WIDTH, BLOCK_K)
            product = tl.dot(a, b.T, product, out_dtype=SUM)
        factor = tl.full((BLOCK_M,), 1.0, tl.float32)
        if CODES:
            row = tl.arange(0, BLOCK_M)
            factor = tl.load(x_scale + first + row, mask=row < end - first, other=0.0)
        tile = Tile(expert, first, end)
        RAGGED: tl.constexpr = heads.all % TILE_HEADS != 0
        store_heads(product, factor, head, tile, scales, cos_sin, out, heads, BLOCK_M, TILE_HEADS, RAGGED)
