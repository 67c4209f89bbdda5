"""The activation of x . weight for Hopper in Gluon, beside the tensor cores; docs/OPS.md states tensors and rounding.

`product_beside` has the roles of a program. The two finishing warps read a tile's sums in pieces of 16 rows, multiply
by both scales, and activate them. A thread has as many columns of one row, gate and linear beside each other, as give
16 bytes of results: 32 columns where SwiGLU7 becomes e4m3. Rows past a row tile's end are not written.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from happyhorse_fast.kernels import numerics
from happyhorse_fast.kernels.product_beside import (
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
    piece_of,
    product_of,
    release_sums,
    run,
    tile_of,
)

gelu7 = gluon.jit(numerics.gelu7.fn)
swiglu7 = gluon.jit(numerics.swiglu7.fn)
to_e4m3 = gluon.jit(numerics.to_e4m3.fn)

SOURCE = gl.constexpr(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
"""Of this file: as of `hopper_sizes`, for Triton's cache, which does not know the source of a property."""


@dataclass(frozen=True)
class Activation:
    """Compile-time constants of an activation: "swiglu7" or "gelu7", and 1 / scale of e4m3 results, 0 of bf16.

    ``per_row`` is 1 for inputs with a scale per row, 0 for one of the tensor.
    """

    name: str
    inverse: float
    per_row: int

    @property
    def per(self) -> int:
        """Columns of the product per result."""
        return 2 if self.name == "swiglu7" else 1

    @property
    def results(self) -> int:
        """Results of a row that a thread stores at once: 16 bytes."""
        return 8 if self.inverse == 0 else 16

    @property
    def columns(self) -> int:
        """Columns that give them: 8, 16 or 32."""
        return self.results * self.per

    @property
    def layout(self) -> Any:
        """Layout of a piece of the product."""
        return self.by(self.columns)

    @property
    def result_layout(self) -> Any:
        """Layout of a piece of results: of each thread's own columns."""
        return self.by(self.results)

    def by(self, width: int) -> Any:
        """Layout of rows of which a thread has ``width`` elements, and ``across`` threads a row."""
        across = 128 // self.columns
        return gl.BlockedLayout([1, width], [32 // across, across], [FINISH_WARPS, 1], [1, 0])


@gluon.constexpr_function
def activation_of(*values):
    """Make one compile-time value of an activation's constants."""
    _ = SOURCE  # which makes it a part of the kernel's key
    return Activation(*values)


@gluon.jit
def activated(value, activation: gl.constexpr):
    """Activate a piece of the product, and round it to the results' format."""
    if activation.per == 2:
        # Gate and linear are adjacent columns, held by the same thread: no data moves.
        gate, up = gl.split(gl.reshape(value, (PIECE, HALF // 2, 2)))
        y = swiglu7(gate, up)
    else:
        y = gelu7(value)
    if activation.inverse != 0:
        y = to_e4m3(y * activation.inverse)
    else:
        y = y.to(gl.bfloat16)
    return gl.convert_layout(y, activation.result_layout)


@gluon.jit
def factors_of(x_scale, at, end, activation: gl.constexpr):
    """Load the scales of a piece's rows."""
    row = at + gl.arange(0, PIECE, layout=gl.SliceLayout(1, activation.layout))
    return gl.load(x_scale + row * activation.per_row, mask=row < end, other=0.0)


@gluon.jit
def activate_tiles(sums, work, given, activation: gl.constexpr, product: gl.constexpr):
    """Activate, in the finishing warps, every tile's product into ``out``. An expert's last tile may be one half.

    Scales of rows are loaded a piece ahead: where they are waited for, 16 pieces wait for some 600 cycles each, and 4
    times that where a thread has 4 rows.
    """
    x_scale, weight_scale, out = given
    F: gl.constexpr = product.features
    RESULTS: gl.constexpr = HALF // activation.per
    layout: gl.constexpr = activation.layout
    stored: gl.constexpr = activation.result_layout
    turn = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        expert, first, end, feature = tile_of(work, item, product)
        for group in range(GROUPS):
            top = first + group * ROWS
            if product.bits == 8:
                factor = factors_of(x_scale, top, end, activation)
            await_sums(sums, group, turn)
            for half in range(gl.minimum(HALVES, (F - feature) // HALF)):
                column = feature + half * HALF
                result = column // activation.per + gl.arange(0, RESULTS, layout=gl.SliceLayout(0, stored))
                if product.bits == 8:
                    channel = expert * F + column + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
                    scale = gl.load(weight_scale + channel)
                for piece in range(PIECES):
                    value = piece_of(sums, group, half, piece, layout)
                    if product.bits == 8:
                        value = value * (factor * product.up)[:, None] * scale[None, :]
                        # Behind a half's last piece comes the next half's first.
                        following = top + (piece + 1) % PIECES * PIECE
                        factor = factors_of(x_scale, following, end, activation)
                    y = activated(value, activation)
                    row = top + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, stored))
                    place = out + (row.to(gl.int64) * (F // activation.per))[:, None] + result[None, :]
                    gl.store(place, y, mask=(row < end)[:, None])
            release_sums(sums, group)
        turn += 1


@gluon.jit
def fp8_linear_activation_beside_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    row_tiles,
    out,
    tiles,
    items,
    F: gl.constexpr,
    K: gl.constexpr,
    INT8: gl.constexpr,
    PER_ROW: gl.constexpr,
    EPILOGUE: gl.constexpr,
    INVERSE: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Activate x . weight into out; ``tiles`` is the length of ``row_tiles``, ``items`` the number of tiles.

    x and weight are TMA descriptors as `residual_beside` takes them. F is a multiple of 128. PER_ROW is 1 for an
    x_scale per row, 0 for one of the tensor. INVERSE is 1 / scale of e4m3 results, 0 where they are bf16.
    """
    product: gl.constexpr = product_of(F, K, x.dtype.primitive_bitwidth, INT8, STAGES, GROUP_M)
    activation: gl.constexpr = activation_of(EPILOGUE, INVERSE, PER_ROW)
    work = Work(row_tiles, tiles, items)
    given = (x_scale, weight_scale, out)
    READ: gl.constexpr = activation.columns
    run(x, weight, work, activate_tiles, given, activation, READ, MULTIPLY_REGISTERS, FINISH_REGISTERS, product)
