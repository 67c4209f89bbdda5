"""hidden += x . weight for Hopper in Gluon, the additions beside the tensor cores; docs/OPS.md states the tensors.

`product_beside` has the roles of a program. The two finishing warps read a tile's sums, multiply by both scales, and
let L2 add 16 bytes a thread at a time (PTX `red.v4.f32`). Each element gets one addend, so the order of additions
changes no bit. Rows past a row tile's end are not touched.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from happyhorse_fast.kernels.product_beside import (
    COLUMNS,
    FINISH_REGISTERS,
    FINISH_WARPS,
    GROUPS,
    HALF,
    HALVES,
    MULTIPLY_REGISTERS,
    PIECE,
    PIECES,
    ROWS,
    Work,
    await_sums,
    load_operands,
    make_operands,
    make_sums,
    multiply,
    piece_of,
    product_of,
    release_sums,
    tile_of,
)


@gluon.jit
def add_tiles(sums, work, x_scale, weight_scale, hidden, PER_ROW: gl.constexpr, product: gl.constexpr):
    """Add, in the finishing warps, every tile's product to ``hidden``."""
    F: gl.constexpr = product.features
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [FINISH_WARPS, 1], [1, 0])
    turn = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        expert, first, end, feature = tile_of(work, item, product)
        for group in range(GROUPS):
            await_sums(sums, group, turn)
            for half in range(HALVES):
                column = feature + half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
                inside = (column < F)[None, :]
                if product.bits == 8:
                    scale = gl.load(weight_scale + expert * F + gl.minimum(column, F - 1))
                for piece in range(PIECES):
                    row = first + group * ROWS + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
                    live = row < end
                    value = piece_of(sums, group, half, piece, layout)
                    if product.bits == 8:
                        factor = gl.load(x_scale + row * PER_ROW, mask=live, other=0.0) * product.up
                        value = value * factor[:, None] * scale[None, :]
                    mask = live[:, None]
                    if F % COLUMNS != 0:
                        mask = mask & inside
                    place = hidden + (row.to(gl.int64) * F)[:, None] + column[None, :]
                    gl.atomic_add(place, value, mask=mask, sem="relaxed")
            release_sums(sums, group)
        turn += 1


@gluon.jit
def fp8_linear_residual_beside_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    row_tiles,
    hidden,
    tiles,
    items,
    F: gl.constexpr,
    K: gl.constexpr,
    INT8: gl.constexpr,
    PER_ROW: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Add x . weight to hidden; ``tiles`` is the length of ``row_tiles``, ``items`` the number of the product's tiles.

    x and weight are TMA descriptors of 64 rows, and of 256 features or in int8 128, by 128 bytes. PER_ROW is 1 for an
    x_scale per row, 0 for one of the tensor.
    """
    product: gl.constexpr = product_of(F, K, x.dtype.primitive_bitwidth, INT8, STAGES, GROUP_M)
    ring = make_operands(x, weight, product)
    sums = make_sums(product, 4)
    fence_async_shared()
    work = Work(row_tiles, tiles, items)
    common = (ring, sums, work)
    gl.warp_specialize(
        [
            (multiply, (0, common, product)),
            (multiply, (1, common, product)),
            (add_tiles, (sums, work, x_scale, weight_scale, hidden, PER_ROW, product)),
            (load_operands, (x, weight, ring, work, product)),
        ],
        [4, FINISH_WARPS, 1],
        [MULTIPLY_REGISTERS, FINISH_REGISTERS, FINISH_REGISTERS],
    )
