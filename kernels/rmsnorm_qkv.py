"""RMSNorm with quantisation, and the QKV product with its epilogue; docs/OPS.md states tensors, layouts and rounding.

A program of the two products computes tiles of 128 rows by one head, so that QK-norm, rotation, gate and quantisation
run on the accumulator. The grid is persistent: programs walk all tiles in steps of the grid's size. (Fusing that walk
with the reduction, tl.range's `flatten`, does not compile around an epilogue with branches: Triton 3.7.1.)

Predicted for 64,256 rows of the 15B model on an H100 (peaks 1979 fp8, 989 bf16 TFLOP/s, 3.35 TB/s), each operand and
result moved once:

| kernel | TFLOP | ms at peak, 8 bits / bf16 | GB 8 bits / bf16 | ms of memory, 8 bits / bf16 |
|---|---|---|---|---|
| rmsnorm_quantize, with a branch | 0 | 0 | 3.62 / 3.95 | 1.08 / 1.18 |
| qkv_linear | 4.80 | 2.43 / 4.85 | 0.87 / 1.70 | 0.26 / 0.51 |

Norm and product in one kernel took 19.2 ms on an H200, the two here 8.6 (docs/decisions/0013-*.md): every column tile
reads its row tile again, 57 times in all, which is 75 GB of float32 through L2 rather than 37.5 of bf16 or 18.8 of
codes, and norms it again.

The epilogue reads 64 KB of cosines and sines per tile of q and k, 1.6 GB from L2 in all; they are float32 and stay so.
"""

import triton
import triton.language as tl

from happyhorse_fast.kernels.numerics import (
    grouped_tile,
    int8_scale_of,
    largest_magnitude,
    scale_of,
    sigmoid,
    to_e4m3,
    to_int8,
)

EPS = tl.constexpr(1e-6)


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
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M whole rows per program, ROW_TILE / BLOCK_M programs per entry of row_tiles: one pass over hidden."""
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
    if OUT == "fp8":
        row_scale = scale_of(tl.max(tl.abs(y), 1))
        tl.store(out, to_e4m3(y / row_scale[:, None]), mask=mask)
        tl.store(scale + row, row_scale, mask=live)
    elif OUT == "int8":
        row_scale = int8_scale_of(largest_magnitude(y, 1))
        tl.store(out, to_int8(y * (1.0 / row_scale)[:, None]), mask=mask)
        tl.store(scale + row, row_scale, mask=live)
    else:
        tl.store(out, y.to(tl.bfloat16), mask=mask)


@triton.jit
def load_rows(source, first, last, stride, k, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_R, BLOCK_K] from row ``first`` and column ``k``; rows past ``last`` repeat it, columns past C are 0.

    Only the tile's first row is multiplied in int64: 128 rows of at most 2^24 elements fit int32.
    """
    row = tl.minimum(tl.arange(0, BLOCK_R), last - first)
    column = k + tl.arange(0, BLOCK_K)
    at = source + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if C % BLOCK_K == 0:
        return tl.load(at)
    return tl.load(at, mask=(column < C)[None, :], other=0.0)


@triton.jit
def rotate(x, phase, live, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rotate adjacent channels; ``phase`` points at the tile's first row of cos_sin.

    Split and join move no data: in the tensor core's layout one thread holds both channels of a pair. The compiler then
    takes both halves through shared memory to the layout in which the phases are loaded.
    """
    at = phase + tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, D // 2)[None, :]
    cos = tl.load(at, mask=live, other=0.0)
    sin = tl.load(at + D // 2, mask=live, other=0.0)
    a, b = tl.split(tl.reshape(x, (BLOCK_M, D // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_M, D))


@triton.jit
def store_rows(out, value, start, head, live, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Store a tile into [N, HEADS, D]."""
    tile = out + (start * HEADS + head) * D
    offset = tl.arange(0, BLOCK_M)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(tile + offset, value, mask=live)


@triton.jit
def store_transposed(tile, value, inverse, slots, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Store value * inverse as e4m3, transposed and in fragment order (docs/OPS.md), in pieces of 32 columns.

    In one piece the addresses alone, 64 of 8 bytes in each thread, make bf16 on sm_90 spill (Triton 3.6.0: 24 bytes).
    """
    if COLUMNS > 32:
        # In the tensor core's layout a choice of registers: no data moves.
        left, right = tl.split(tl.permute(tl.reshape(value, (BLOCK_M, 2, COLUMNS // 2)), (0, 2, 1)))
        store_transposed(tile, left, inverse, slots, COLUMNS // 2, BLOCK_M)
        store_transposed(tile + COLUMNS // 2 * slots, right, inverse, slots, COLUMNS // 2, BLOCK_M)
    else:
        row = tl.arange(0, BLOCK_M)
        place = row // 16 * 16 + row % 8 // 2 * 4 + row % 16 // 8 * 2 + row % 2
        tl.store(tile + tl.arange(0, COLUMNS)[None, :] * slots + place[:, None], to_e4m3(value * inverse))


@triton.jit
def store_v_codes(v, v_scale, product, first, end, head, blocks, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Quantise a tile by its own maximum and store it transposed, rows past its end as zeros."""
    row = tl.arange(0, BLOCK_M)
    held = tl.where((row < end - first)[:, None], product, 0.0)
    # Over both axes at once: row by row and then over rows, Triton 3.7.1 fails to compile for sm_100.
    scale = scale_of(tl.max(tl.abs(held)))
    slots = blocks * BLOCK_M
    store_transposed(v + (head * D).to(tl.int64) * slots + first, held, 1.0 / scale, slots, D, BLOCK_M)
    tl.store(v_scale + head * blocks + first // BLOCK_M, scale)


@triton.jit
def store_q_codes(q, q_scale, y, start, head, live, HQ: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Quantise every row of a tile of q to int8 by its own maximum."""
    scale = int8_scale_of(tl.max(tl.abs(y), 1))[:, None]
    store_rows(q, to_int8(y * (1.0 / scale)), start, head, live, HQ, D, BLOCK_M)
    tl.store(q_scale + start * HQ + (tl.arange(0, BLOCK_M)[:, None] * HQ + head), scale, mask=live)


@triton.jit
def store_k_codes(k, k_scale, y, start, head, live, blocks, HKV: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Quantise a tile of k to int8 by its own maximum; rows past its end do not count."""
    scale = int8_scale_of(tl.max(tl.abs(tl.where(live, y, 0.0))))  # over both axes at once, as for v
    store_rows(k, to_int8(y * (1.0 / scale)), start, head, live, HKV, D, BLOCK_M)
    tl.store(k_scale + head * blocks + start // BLOCK_M, scale)


@triton.jit
def store_head(
    product,
    head,
    expert,
    first,
    end,
    qk_norm,
    cos_sin,
    qk_scale,
    k_mean,
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    gate,
    blocks,
    D: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    INT8_QK: tl.constexpr,
    FP8_OUT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The epilogue: what one tile of the product becomes, by the kind of its head (q, k, v or gates)."""
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, D)
    live = (row < end - first)[:, None]
    start = first.to(tl.int64)
    if head < HQ + HKV:
        which = expert * 2 + (head >= HQ).to(tl.int32)
        norm = tl.load(qk_norm + which * D + column) + 1.0
        inverse = tl.rsqrt(tl.sum(product * product, 1) / D + EPS)
        y = rotate(product * inverse[:, None] * norm[None, :], cos_sin + start * D, live, D, BLOCK_M)
        if HAS_MEAN:
            if head >= HQ:
                y -= tl.load(k_mean + (head - HQ) * D + column)[None, :]
        if INT8_QK:
            if head < HQ:
                store_q_codes(q, q_scale, y, start, head, live, HQ, D, BLOCK_M)
            else:
                store_k_codes(k, k_scale, y, start, head - HQ, live, blocks, HKV, D, BLOCK_M)
        else:
            if FP8_OUT:
                scale = tl.load(qk_scale + which)
                # The reciprocal of a scalar, once: on paper a division per element is 1024 of the tile's 20480 cycles.
                value = to_e4m3(y * (1.0 / scale))
                if head == 0:
                    tl.store(q_scale + first // BLOCK_M, scale)
                elif head == HQ:
                    tl.store(k_scale + first // BLOCK_M, scale)
            else:
                value = y.to(tl.bfloat16)
            if head < HQ:
                store_rows(q, value, start, head, live, HQ, D, BLOCK_M)
            else:
                store_rows(k, value, start, head - HQ, live, HKV, D, BLOCK_M)
    elif head < HQ + 2 * HKV:
        if FP8_OUT:
            store_v_codes(v, v_scale, product, first, end, head - (HQ + HKV), blocks, D, BLOCK_M)
        else:
            store_rows(v, product.to(tl.bfloat16), start, head - (HQ + HKV), live, HKV, D, BLOCK_M)
    else:
        head_q = (head - (HQ + 2 * HKV)) * D + column
        mask = live & (head_q < HQ)[None, :]
        tl.store(gate + start * HQ + (row[:, None] * HQ + head_q[None, :]), sigmoid(product), mask=mask)


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
    k_mean,
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
    FP8_OUT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x . weight per head, and its epilogue; x and weight are pointers, or TMA descriptors with DESCRIPTORS.

    CODES says that the operands have scales, INT8 that they are int8 and not e4m3: their sum is exact, in int32.

    e4m3 products accumulate as the tensor core does by default, over all of C: only hardware shows what that costs in
    accuracy. Promoting to float32 every 128 took 163 registers instead of 102 in a smaller kernel (this one has 255 of
    255 without it), and max_num_imprecise_acc=0 silently leaves the fp8 tensor cores.
    """
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    HEADS: tl.constexpr = HQ + 2 * HKV + (HQ + D - 1) // D
    for tile in tl.range(tl.program_id(0), tiles * HEADS, tl.num_programs(0)):
        m, head = grouped_tile(tile, tiles, HEADS, GROUP_M)
        expert = tl.load(row_tiles + 3 * m)
        first = tl.load(row_tiles + 3 * m + 1)
        end = tl.load(row_tiles + 3 * m + 2)
        feature = (expert * HEADS + head) * D
        product = tl.zeros((BLOCK_M, D), SUM)
        for at in tl.range(0, C, BLOCK_K):
            if DESCRIPTORS:
                a = x.load([first, at])
                b = weight.load([feature, at])
            else:
                a = load_rows(x, first, end - 1, x_stride, at, C, BLOCK_M, BLOCK_K)
                b = load_rows(weight, feature, feature + D - 1, C, at, C, D, BLOCK_K)
            product = tl.dot(a, b.T, product, out_dtype=SUM)
        if CODES:
            row = tl.arange(0, BLOCK_M)
            scales = tl.load(x_scale + first + row, mask=row < end - first, other=0.0)
            product = product.to(tl.float32) * scales[:, None]
            product *= tl.load(weight_scale + feature + tl.arange(0, D))[None, :]
        else:
            product = product.to(tl.bfloat16).to(tl.float32)
        store_head(
            product, head, expert, first, end, qk_norm, cos_sin, qk_scale, k_mean, q, k, v, q_scale, k_scale, v_scale,
            gate, blocks, D, HQ, HKV, INT8_QK, FP8_OUT, HAS_MEAN, BLOCK_M,
        )  # fmt: skip
