"""x . weight with its epilogue, bf16, int8 or e4m3, rows grouped by expert; docs/OPS.md has tensors and rounding.

A program computes tiles of BLOCK_M rows of one expert by BLOCK_N features. The grid is persistent: programs walk all
tiles in steps of the grid's size, GROUP_M row tiles per column tile, so that a weight tile is read from L2.

Predicted for 64,256 rows of the 15B model on an H100 (peaks 1979 fp8, 989 bf16 TFLOP/s, 3.35 TB/s), each operand and
result moved once: the tensor cores are the floor of all, 1.9 (proj, fp8) to 23 times (up) over memory.

| product | TFLOP | ms at peak, fp8 / bf16 | GB fp8 / bf16 | ms of memory, fp8 / bf16 |
|---|---|---|---|---|
| proj 5120 -> 5120, residual | 3.37 | 1.70 / 3.41 | 2.99 / 3.34 | 0.89 / 1.00 |
| up 5120 -> 27392, SwiGLU7 | 18.02 | 9.11 / 18.2 | 1.35 / 2.70 | 0.40 / 0.80 |
| down 13696 -> 5120, residual | 9.01 | 4.55 / 9.11 | 3.58 / 4.53 | 1.07 / 1.35 |

The residual is 2.63 GB of these: 64,256 x 5120 float32 read and written, and the program waits for what it reads. On
sm_90, and but for int8 on sm_100, the memory adds (TMA reduce), in pieces of 64 columns: 1.32 GB go to L2, none comes
back to a program, no register holds an address, and the last of a tile's four pieces is under way while the next tile's
operands arrive; L2 still reads and writes the 2.63 GB. 8 bits with one scale and load, add, store took 7.4 (down) and
3.2 ms (proj) on an H200 at 700 W, the bare products 7.0 and 2.7. Predicted with the reduce: 7.2 and 2.9.
"""

import triton
import triton.language as tl

from happyhorse_fast.kernels.numerics import gelu7, grouped_tile, swiglu7, to_e4m3


@triton.jit
def load_tile(source, first, last, at, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_R, BLOCK_K] of [rows, K] from (first, at); rows past ``last`` repeat it, columns past K are 0.

    Repeating needs no mask in the loop. Only the first row is multiplied in int64: 128 rows fit int32.
    """
    row = tl.minimum(tl.arange(0, BLOCK_R), last - first)
    column = at + tl.arange(0, BLOCK_K)
    place = source + first.to(tl.int64) * K + (row[:, None] * K + column[None, :])
    if K % BLOCK_K == 0:
        return tl.load(place)
    return tl.load(place, mask=(column < K)[None, :], other=0.0)


@triton.jit
def finish(
    product,
    factor,
    weight_scale,
    out,
    first,
    end,
    expert,
    feature,
    F: tl.constexpr,
    RAGGED: tl.constexpr,
    CODES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INVERSE: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue: what a tile of the product from (first, feature) becomes; rows from ``end`` on are left alone.

    Wide tiles are finished in pieces of 128 bytes per row, of swiglu7 and of e4m3 in 64: in one piece a residual of
    128 x 256 spills 1,104 bytes, in pieces of 32 columns the whole kernel takes 186 registers. With REDUCE ``out`` is a
    descriptor of pieces of REDUCE columns, to which the hardware adds: each element has one addend, so that their order
    changes no bit. It clips at N and F but knows no ``end``: rows past it get -0.0, which changes no number
    but a subnormal one, which may become zero.
    """
    RESIDUAL: tl.constexpr = REDUCE if REDUCE != 0 else 32
    PIECE: tl.constexpr = RESIDUAL if EPILOGUE == "residual" else 64 if EPILOGUE == "plain" else 128
    if BLOCK_N > PIECE:
        # In the tensor core's layout a choice of registers: no data moves.
        left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        finish(
            left, factor, weight_scale, out, first, end, expert, feature,
            F, RAGGED, CODES, EPILOGUE, INVERSE, REDUCE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        finish(
            right, factor, weight_scale, out, first, end, expert, feature + BLOCK_N // 2,
            F, RAGGED, CODES, EPILOGUE, INVERSE, REDUCE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        if CODES:
            channel = feature + tl.arange(0, BLOCK_N)
            if RAGGED:
                channel = tl.minimum(channel, F - 1)
            product = product.to(tl.float32) * factor[:, None] * tl.load(weight_scale + expert * F + channel)[None, :]
        else:
            product = product.to(tl.bfloat16).to(tl.float32)
        if EPILOGUE == "swiglu7":
            # Gate and linear are neighbours: again one thread holds both.
            gate, up = tl.split(tl.reshape(product, (BLOCK_M, BLOCK_N // 2, 2)))
            y = swiglu7(gate, up)
        elif EPILOGUE == "gelu7":
            y = gelu7(product)
        else:
            y = product
        row = tl.arange(0, BLOCK_M)
        live = row < end - first
        if REDUCE != 0:
            # Written -0.0, Triton makes it 0.0.
            nothing = tl.full((BLOCK_M, BLOCK_N), -(2**31), tl.int32).to(tl.float32, bitcast=True)
            out.atomic_add([first, feature], tl.where(live[:, None], y, nothing))
        else:
            PER: tl.constexpr = 2 if EPILOGUE == "swiglu7" else 1
            COLUMNS: tl.constexpr = F // PER
            start = first.to(tl.int64)
            column = feature // PER + tl.arange(0, BLOCK_N // PER)
            if RAGGED:
                # The last tile, and with it whole pieces, may lie past F.
                live = live & (feature < F)
                mask = live[:, None] & (column < COLUMNS)[None, :]
            else:
                mask = live[:, None]
            at = out + start * COLUMNS + (row[:, None] * COLUMNS + column[None, :])
            if EPILOGUE == "residual":
                tl.store(at, tl.load(at, mask=mask, other=0.0) + y, mask=mask)
            elif INVERSE != 0:
                tl.store(at, to_e4m3(y * INVERSE), mask=mask)
            else:
                tl.store(at, y.to(tl.bfloat16), mask=mask)


@triton.jit
def fp8_linear_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    row_tiles,
    out,
    tiles,
    F: tl.constexpr,
    K: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CODES: tl.constexpr,
    INT8: tl.constexpr,
    PER_ROW: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INVERSE: tl.constexpr,
    REDUCE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x and weight are pointers, or TMA descriptors with DESCRIPTORS; ``tiles`` is the length of ``row_tiles``.

    CODES says that the operands have scales, INT8 that they are int8 and not e4m3: their sum, in int32, is exact.
    PER_ROW is 1 for an x_scale per row, 0 for one of the tensor. INVERSE is 1 / scale of e4m3 results, 0 where they are
    bf16. A product of e4m3 accumulates in the tensor core alone, whose default never leaves it (turning promotion on by
    max_num_imprecise_acc = 32 spills, 0 silently leaves the fp8 tensor cores).
    """
    PARTS: tl.constexpr = ROW_TILE // BLOCK_M
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    COLUMN_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    # Flattened, the next tile's operands are loaded during the epilogue.
    for tile in tl.range(tl.program_id(0), tiles * PARTS * COLUMN_TILES, tl.num_programs(0), flatten=True):
        m, n = grouped_tile(tile, tiles * PARTS, COLUMN_TILES, GROUP_M)
        entry = row_tiles + 3 * (m // PARTS)
        expert = tl.load(entry)
        first = tl.load(entry + 1) + m % PARTS * BLOCK_M
        end = tl.load(entry + 2)
        feature = n * BLOCK_N
        channel = expert * F + feature
        last = expert * F + F - 1
        # A part may lie past the end of a short row tile: then every row repeats the last one, and none is stored.
        row = tl.minimum(tl.arange(0, BLOCK_M), end - 1 - first)
        product = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for at in tl.range(0, K, BLOCK_K):
            if DESCRIPTORS:
                a = x.load([first, at])
                b = weight.load([channel, at])
            else:
                a = load_tile(x, first, end - 1, at, K, BLOCK_M, BLOCK_K)
                b = load_tile(weight, channel, last, at, K, BLOCK_N, BLOCK_K)
            product = tl.dot(a, b.T, product, out_dtype=SUM)
        factor = tl.full((BLOCK_M,), 1.0, tl.float32)
        if CODES:
            factor = tl.load(x_scale + (first + row) * PER_ROW)
        finish(
            product, factor, weight_scale, out, first, end, expert, feature,
            F, F % BLOCK_N != 0, CODES, EPILOGUE, INVERSE, REDUCE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
