"""Pieces of QKV's heads in the registers of `qkv_beside`'s finishing warps: what they load, norm, rotate and store.

A piece is 16 rows of a head. A thread has 8 channels of 4 rows: a row is in 16 threads, so its norm takes 4 shuffles,
and a rotary pair is in one.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from happyhorse_fast.kernels import numerics
from happyhorse_fast.kernels.product_beside import FINISH_WARPS, PIECE, PIECES, piece_of
from happyhorse_fast.kernels.qkv import EPS

larger = gluon.jit(numerics.larger.fn)

D = gl.constexpr(128)
"""Channels of a head."""
BY_ROW = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [FINISH_WARPS, 1], [1, 0]))
"""A thread has 8 channels of a row, 16 threads the row."""
BY_PAIR = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [FINISH_WARPS, 1], [1, 0]))
"""Their phases: one of each rotary pair."""
BY_CHANNEL = gl.constexpr(gl.BlockedLayout([16, 2], [1, 32], [1, FINISH_WARPS], [0, 1]))
"""A thread has 16 rows of two channels: what e4m3 v stores, transposed."""


class Head(NamedTuple):
    """A head of a tile: which ``half`` of it, of which ``expert``, and the tile's rows."""

    half: Any
    index: Any
    expert: Any
    first: Any
    end: Any


class Ahead(NamedTuple):
    """What is loaded of a piece before the piece before is finished: scales and phases of its rows."""

    factor: Any
    cos: Any
    sin: Any


@gluon.jit
def rows_of(head, piece, layout: gl.constexpr):
    """Return a piece's rows, and which of them exist."""
    row = head.first + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
    return row, row < head.end


@gluon.jit
def rows_within(head, piece, layout: gl.constexpr):
    """Return a piece's rows, of what is loaded: the tile's last row instead of those past its end.

    A load under a mask takes an instruction for every two registers that it may leave as they are.
    """
    row, _ = rows_of(head, piece, layout)
    return gl.minimum(row, head.end - 1)


@gluon.jit
def factors_of(head, piece, scales, layout: gl.constexpr, heads: gl.constexpr):
    """Load the scales of a piece's rows."""
    if heads.codes:
        return gl.load(scales.x + rows_within(head, piece, layout))
    else:
        return gl.full([PIECE], 1.0, gl.float32, layout=gl.SliceLayout(1, layout))


@gluon.jit
def phases_of(head, piece, cos_sin):
    """Load the cosines and sines of a piece's rows."""
    row = rows_within(head, piece, BY_PAIR).to(gl.int64)
    at = cos_sin + row[:, None] * D + gl.arange(0, D // 2, layout=gl.SliceLayout(0, BY_PAIR))[None, :]
    return gl.load(at), gl.load(at + D // 2)


@gluon.jit
def ahead_of(head, piece, scales, cos_sin, heads: gl.constexpr):
    """Load the scales and phases of a piece's rows."""
    factor = factors_of(head, piece, scales, BY_ROW, heads)
    cos, sin = phases_of(head, piece, cos_sin)
    return Ahead(factor, cos, sin)


@gluon.jit
def weights_of(head, scales, layout: gl.constexpr, heads: gl.constexpr):
    """Load the weight's scales of a head's channels."""
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    if heads.codes:
        return gl.load(scales.weight + (head.expert * heads.all + head.index) * D + column)
    else:
        return gl.full([D], 1.0, gl.float32, layout=gl.SliceLayout(0, layout))


@gluon.jit
def channels_of(head, scales, heads: gl.constexpr):
    """Load what a head of q or k has of each channel: the weight's scale, and the norm's factor."""
    which = head.expert * 2 + (head.index >= heads.q).to(gl.int32)
    norm = gl.load(scales.norm + which * D + gl.arange(0, D, layout=gl.SliceLayout(0, BY_ROW)))
    return weights_of(head, scales, BY_ROW, heads), norm + 1.0


@gluon.jit
def values_of(sums, head, piece, weights, layout: gl.constexpr):
    """Load a piece of the product, with the weight's scales and without its rows'."""
    return piece_of(sums, piece // PIECES, head.half, piece % PIECES, layout) * weights[None, :]


@gluon.jit
def largest(value):
    """Return the largest magnitude of each row, NaN where it has one."""
    return gl.reduce(gl.abs(value), 1, larger)


@gluon.jit
def held_or(held, amax, live):
    """Return the largest magnitudes so far, of rows that exist."""
    return larger(held, gl.where(live, amax, 0.0))


@gluon.jit
def rounded(x):
    """Round as `numerics.to_int8`, without its clamp: a scale by the largest magnitude leaves no more than 127."""
    return (x + 12582912.0).to(gl.int32, bitcast=True).to(gl.int8)


@gluon.jit
def store_rows(out, value, head, index, piece, HEADS: gl.constexpr):
    """Store a piece of a head into [N, HEADS, D]."""
    row, live = rows_of(head, piece, BY_ROW)
    column = gl.arange(0, D, layout=gl.SliceLayout(0, BY_ROW))
    gl.store(out + (row.to(gl.int64) * HEADS + index)[:, None] * D + column[None, :], value, mask=live[:, None])


@gluon.jit
def rotated(sums, head, piece, channels, loaded, product: gl.constexpr):
    """Return a piece of a head of q or k, rotated, and by what its rows are then to be multiplied.

    That is their scale over their norm, which a rotation leaves as it is. Results have a scale of a row in any case, so
    nothing else multiplies an element by either.
    """
    weights, norm = channels
    factor = loaded.factor * product.up
    value = values_of(sums, head, piece, weights, BY_ROW)
    inverse = gl.rsqrt(gl.sum(value * value, axis=1) * factor * factor / D + EPS)
    a, b = gl.split(gl.reshape(value * norm[None, :], (PIECE, D // 2, 2)))
    cos = gl.convert_layout(loaded.cos, a.type.layout)
    sin = gl.convert_layout(loaded.sin, a.type.layout)
    y = gl.reshape(gl.join(a * cos - b * sin, b * cos + a * sin), (PIECE, D))
    return gl.convert_layout(y, BY_ROW), inverse * factor
