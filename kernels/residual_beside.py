"""hidden += x . weight for Hopper in Gluon, the additions beside the tensor cores; docs/OPS.md states the tensors.

`product_beside` has the roles of a program. The two finishing warps read a tile's sums in pieces of 16 rows, multiply
by both scales, add and store, 16 bytes a thread at a time. A quarter of a piece is added at once; what that quarter of
the next piece is added to is loaded before, 16 KiB under way. L2 could add instead (PTX `red.v4.f32`), but at some 470
GB/s: 2.8 ms for proj's 1.31 GB, where its product takes 2.25 (H100). An element gets one addend, so the order of tiles
changes no bit. Rows past a row tile's end and features past the last are neither read nor written.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from happyhorse_fast.kernels.product_beside import (
    COLUMNS,
    EVEN_REGISTERS,
    FINISH_WARPS,
    GROUPS,
    HALF,
    HALVES,
    PIECE,
    PIECES,
    Work,
    await_sums,
    piece_of,
    product_of,
    release_sums,
    run,
    tile_of,
)

QUARTER = gl.constexpr(64)
"""Features that are added at once: of 16 rows, 16 residuals a thread."""
LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [FINISH_WARPS, 1], [1, 0]))
"""Of a piece: a thread has 4 adjacent features of 4 rows, and of those that are 64 on."""


@gluon.jit
def rows_of(first, end, piece):
    """Return a piece's rows of a tile, and which of them exist: none of the piece after the last."""
    row = first + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, LAYOUT))
    return row, row < end


@gluon.jit
def place_of(hidden, row, live, feature, product: gl.constexpr):
    """Return the addresses of a quarter of a piece in ``hidden``, and which of them exist."""
    F: gl.constexpr = product.features
    column = feature + gl.arange(0, QUARTER, layout=gl.SliceLayout(0, LAYOUT))
    mask = live[:, None]
    if F % COLUMNS != 0:
        mask = mask & (column < F)[None, :]
    return hidden + (row.to(gl.int64) * F)[:, None] + column[None, :], mask


@gluon.jit
def residual_of(hidden, row, live, feature, product: gl.constexpr):
    """Load what a quarter of a piece is added to."""
    place, mask = place_of(hidden, row, live, feature, product)
    return gl.load(place, mask=mask)


@gluon.jit
def scale_of(weight_scale, expert, feature, product: gl.constexpr):
    """Load the scales of a half's features."""
    F: gl.constexpr = product.features
    column = feature + gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(weight_scale + expert * F + gl.minimum(column, F - 1))


@gluon.jit
def add_quarter(residual, value, hidden, now, after, feature, product: gl.constexpr):
    """Add a quarter of a piece to its residual, and store it; return the next piece's residual, loaded before.

    ``now`` and ``after`` are the rows of both pieces, and which of them exist.
    """
    following = residual_of(hidden, after[0], after[1], feature, product)
    place, mask = place_of(hidden, now[0], now[1], feature, product)
    gl.store(place, residual + gl.convert_layout(value, LAYOUT), mask=mask)
    return following


@gluon.jit
def half_of(sums, half: gl.constexpr, piece, by, scale, product: gl.constexpr):
    """Return one half of a piece, with its scales, in quarters. A split only chooses registers."""
    value = piece_of(sums, piece // PIECES, half, piece % PIECES, LAYOUT)
    if product.bits == 8:
        value = value * by[:, None] * scale[None, :]
    return gl.split(gl.permute(gl.reshape(value, (PIECE, HALVES, QUARTER)), (0, 2, 1)))


@gluon.jit
def add_tiles(sums, work, given, PER_ROW: gl.constexpr, product: gl.constexpr):
    """Add, in the finishing warps, every tile's product to ``hidden``.

    What a quarter of a piece is added to is loaded where that of the piece before is used, a tile's first before its
    sums are awaited.
    """
    x_scale, weight_scale, hidden = given
    turn = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        expert, first, end, feature = tile_of(work, item, product)
        row, live = rows_of(first, end, 0)
        to_a = residual_of(hidden, row, live, feature, product)
        to_b = residual_of(hidden, row, live, feature + QUARTER, product)
        to_c = residual_of(hidden, row, live, feature + 2 * QUARTER, product)
        to_d = residual_of(hidden, row, live, feature + 3 * QUARTER, product)
        left = 1.0
        right = 1.0
        factor = 1.0
        if product.bits == 8:
            left = scale_of(weight_scale, expert, feature, product)
            right = scale_of(weight_scale, expert, feature + HALF, product)
            factor = gl.load(x_scale + row * PER_ROW, mask=live, other=0.0)
        for group in range(GROUPS):
            await_sums(sums, group, turn)
        for piece in range(GROUPS * PIECES):
            now = rows_of(first, end, piece)
            after = rows_of(first, end, piece + 1)
            by = factor
            if product.bits == 8:
                by = factor * product.up
                factor = gl.load(x_scale + after[0] * PER_ROW, mask=after[1], other=0.0)
            a, b = half_of(sums, 0, piece, by, left, product)
            to_a = add_quarter(to_a, a, hidden, now, after, feature, product)
            to_b = add_quarter(to_b, b, hidden, now, after, feature + QUARTER, product)
            c, d = half_of(sums, 1, piece, by, right, product)
            to_c = add_quarter(to_c, c, hidden, now, after, feature + 2 * QUARTER, product)
            to_d = add_quarter(to_d, d, hidden, now, after, feature + 3 * QUARTER, product)
        for group in range(GROUPS):
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
    work = Work(row_tiles, tiles, items)
    given = (x_scale, weight_scale, hidden)
    run(x, weight, work, add_tiles, given, PER_ROW, 4, EVEN_REGISTERS, EVEN_REGISTERS, product)
