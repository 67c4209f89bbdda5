"""x . weight with its epilogue, bf16, int8 or e4m3, rows grouped by expert; docs/OPS.md has tensors and rounding.

A program computes tiles of BLOCK_M rows of one expert by BLOCK_N features. The grid is persistent: programs walk all
tiles in steps of the grid's size, GROUP_M row tiles per column tile, so that a weight tile is read from L2.

Predicted for 64,256 rows of the 15B model on an H100 (peaks 1979 fp8, 989 bf16 TFLOP/s, 3.35 TB/s), each operand and
result moved once. All products are bound by the tensor cores, which take 1.9 (proj, fp8) to 23 times (up) as long as
memory:

| product | TFLOP | ms at peak, fp8 / bf16 | GB fp8 / bf16 | ms of memory, fp8 / bf16 |
|---|---|---|---|---|
| proj 5120 -> 5120, residual | 3.37 | 1.70 / 3.41 | 2.99 / 3.34 | 0.89 / 1.00 |
| up 5120 -> 27392, SwiGLU7 | 18.02 | 9.11 / 18.2 | 1.35 / 2.70 | 0.40 / 0.80 |
| down 13696 -> 5120, residual | 9.01 | 4.55 / 9.11 | 3.58 / 4.53 | 1.07 / 1.35 |

The residual is 2.63 GB of these, 64,256 x 5120 float32 read and written. A program that loads, adds and stores waits
for what it reads. On sm_100 except in int8, and on sm_90, where `residual_beside` runs unless this kernel is asked for,
L2 does the addition (TMA reduce), in pieces of 64 columns:
1.32 GB go to L2, nothing comes back to a program, and no register holds an address. The last of a tile's four pieces is
in flight while the next tile's operands arrive. L2 still reads and writes the 2.63 GB. On an H200 at 700 W, fp8 with
load, add and store took 7.4 (down) and 3.2 ms (proj), the products alone 7.0 and 2.7. With the reduce 7.2 and 2.9 were
predicted; docs/kernels/linear.md has the measured times.
"""

import triton
import triton.language as tl

from happyhorse_fast.kernels.numerics import gelu7, grouped_tile, load_rows, swiglu7, to_e4m3


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
    """Run the epilogue on a tile of the product that starts at (first, feature), and store rows before ``end``.

    A wide tile is finished in pieces: 32 columns of a residual (REDUCE with the reduce), 64 of a plain product, 128
    before an activation. In one piece a residual of 128 x 256 spills 1,104 bytes; in pieces of 32 columns the whole
    kernel takes 186 registers. With REDUCE ``out`` is a descriptor of pieces of REDUCE columns, to which the hardware
    adds. Each element gets one addend, so the order of additions changes no bit. The descriptor clips at N and F but
    not at ``end``: rows from there on get -0.0 added, which changes nothing but may flush a subnormal number to zero.
    """
    RESIDUAL: tl.constexpr = REDUCE if REDUCE != 0 else 32
    PIECE: tl.constexpr = RESIDUAL if EPILOGUE == "residual" else 64 if EPILOGUE == "plain" else 128
    if BLOCK_N > PIECE:
        # In the tensor core's layout this split only chooses registers: no data moves.
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
            # Gate and linear are adjacent columns, held by the same thread: no data moves here either.
            gate, up = tl.split(tl.reshape(product, (BLOCK_M, BLOCK_N // 2, 2)))
            y = swiglu7(gate, up)
        elif EPILOGUE == "gelu7":
            y = gelu7(product)
        else:
            y = product
        row = tl.arange(0, BLOCK_M)
        live = row < end - first
        if REDUCE != 0:
            # By its bits: Triton turns the literal -0.0 into 0.0.
            nothing = tl.full((BLOCK_M, BLOCK_N), -(2**31), tl.int32).to(tl.float32, bitcast=True)
            out.atomic_add([first, feature], tl.where(live[:, None], y, nothing))
        else:
            PER: tl.constexpr = 2 if EPILOGUE == "swiglu7" else 1
            COLUMNS: tl.constexpr = F // PER
            start = first.to(tl.int64)
            column = feature // PER + tl.arange(0, BLOCK_N // PER)
            if RAGGED:
                # Pieces of the last column tile may lie past F.
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
    """Multiply and run the epilogue on all tiles; ``tiles`` is the length of ``row_tiles``.

    x and weight are pointers, or TMA descriptors with DESCRIPTORS. With CODES the operands have scales; with INT8 they
    are int8, else e4m3. Sums of int8 are exact, in int32. PER_ROW is 1 for an x_scale per row, 0 for one of the tensor.
    INVERSE is 1 / scale of e4m3 results, 0 where they are bf16. e4m3 accumulates in the tensor core throughout,
    Triton's default. Promoting sums to float32 by max_num_imprecise_acc = 32 spills; 0 silently leaves the fp8 tensor
    cores.
    """
    PARTS: tl.constexpr = ROW_TILE // BLOCK_M
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    COLUMN_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    # flatten makes one loop of tiles and reduction, so that the next tile's operands are loaded during the epilogue.
    for tile in tl.range(tl.program_id(0), tiles * PARTS * COLUMN_TILES, tl.num_programs(0), flatten=True):
        m, n = grouped_tile(tile, tiles * PARTS, COLUMN_TILES, GROUP_M)
        entry = row_tiles + 3 * (m // PARTS)
        expert = tl.load(entry)
        first = tl.load(entry + 1) + m % PARTS * BLOCK_M
        end = tl.load(entry + 2)
        feature = n * BLOCK_N
        channel = expert * F + feature
        last = expert * F + F - 1
        # A part past the end of a short row tile repeats the last row throughout and stores nothing.
        row = tl.minimum(tl.arange(0, BLOCK_M), end - 1 - first)
        product = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for at in tl.range(0, K, BLOCK_K):
            if DESCRIPTORS:
                a = x.load([first, at])
                b = weight.load([channel, at])
            else:
                a = load_rows(x, first, end - 1, K, at, K, BLOCK_M, BLOCK_K)
                b = load_rows(weight, channel, last, K, at, K, BLOCK_N, BLOCK_K)
            product = tl.dot(a, b.T, product, out_dtype=SUM)
        factor = tl.full((BLOCK_M,), 1.0, tl.float32)
        if CODES:
            factor = tl.load(x_scale + (first + row) * PER_ROW)
        finish(
            product, factor, weight_scale, out, first, end, expert, feature,
            F, F % BLOCK_N != 0, CODES, EPILOGUE, INVERSE, REDUCE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
