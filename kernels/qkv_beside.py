"""QKV's product for Hopper in Gluon, with its epilogue beside the tensor cores; docs/OPS.md states tensors, rounding.

`product_beside` has the roles of a program. A tile is two heads of 128 channels. The two finishing warps read a head's
sums in pieces of 16 rows, each thread 8 channels of 4 rows: a row is in 16 threads, so its norm takes 4 shuffles,
and a rotary pair is in one. int8 k and e4m3 v have a scale per head and 128 rows, so their warps walk a head twice:
once for its largest magnitude, once for its codes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from happyhorse_fast.kernels import numerics
from happyhorse_fast.kernels.product_beside import (
    FINISH_REGISTERS,
    FINISH_WARPS,
    GROUPS,
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
from happyhorse_fast.kernels.qkv import EPS

int8_scale_of = gluon.jit(numerics.int8_scale_of.fn)
scale_of = gluon.jit(numerics.scale_of.fn)
to_e4m3 = gluon.jit(numerics.to_e4m3.fn)
to_int8 = gluon.jit(numerics.to_int8.fn)

SOURCE = gl.constexpr(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
"""Of this file: as of `hopper_sizes`, for Triton's cache, which does not know the source of a property."""
D = gl.constexpr(128)
"""Channels of a head."""


@dataclass(frozen=True)
class Heads:
    """Compile-time constants of QKV: heads, formats, and layouts of a piece of 16 rows in registers."""

    q: int
    kv: int
    codes: bool
    int8_qk: bool
    fp8: bool

    @property
    def rotated(self) -> int:
        """Heads of q and k."""
        return self.q + self.kv

    @property
    def gates(self) -> int:
        """The first head of gates."""
        return self.q + 2 * self.kv

    @property
    def all(self) -> int:
        """Heads, those of gates included."""
        return self.gates - (-self.q // 128)

    @property
    def by_row(self) -> Any:
        """A thread has 8 channels of a row, 16 threads the row."""
        return gl.BlockedLayout([1, 8], [2, 16], [FINISH_WARPS, 1], [1, 0])

    @property
    def by_pair(self) -> Any:
        """Their phases: one of each rotary pair."""
        return gl.BlockedLayout([1, 4], [2, 16], [FINISH_WARPS, 1], [1, 0])

    @property
    def by_channel(self) -> Any:
        """A thread has 16 rows of two channels: what e4m3 v stores, transposed."""
        return gl.BlockedLayout([16, 2], [1, 32], [1, FINISH_WARPS], [0, 1])


@gluon.constexpr_function
def heads_of(*values):
    """Make one compile-time value of the heads' constants."""
    _ = SOURCE  # which makes it a part of the kernel's key
    return Heads(*values)


class Scales(NamedTuple):
    """Scales of a launch: of x's rows, of the weight's channels, of norms [E, 2, D], and static ones of q and k."""

    x: Any
    weight: Any
    norm: Any
    qk: Any


class Results(NamedTuple):
    """Where the results go. ``blocks`` are those of 128 rows."""

    q: Any
    k: Any
    v: Any
    q_scale: Any
    k_scale: Any
    v_scale: Any
    gate: Any
    blocks: Any


class Head(NamedTuple):
    """A head of a tile: which ``half`` of it, of which ``expert``, and the tile's rows."""

    half: Any
    index: Any
    expert: Any
    first: Any
    end: Any


@gluon.jit
def rows_of(head, group, piece, layout: gl.constexpr):
    """Return a piece's rows, and which of them exist."""
    row = head.first + group * ROWS + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
    return row, row < head.end


@gluon.jit
def values_of(sums, head, group, piece, scales, layout: gl.constexpr, product: gl.constexpr, heads: gl.constexpr):
    """Load a piece of the product, with its scales."""
    value = piece_of(sums, group, head.half, piece, layout)
    if heads.codes:
        row, live = rows_of(head, group, piece, layout)
        column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
        factor = gl.load(scales.x + row, mask=live, other=0.0) * product.up
        value = value * factor[:, None]
        value = value * gl.load(scales.weight + (head.expert * heads.all + head.index) * D + column)[None, :]
    return value


@gluon.jit
def largest(held, value, live):
    """Return the largest magnitudes of each row so far, as bits: these have the order of magnitudes, with NaN last."""
    bits = gl.where(live[:, None], value, 0.0).to(gl.int32, bitcast=True) & 0x7FFFFFFF
    return gl.maximum(held, gl.max(bits, axis=1))


@gluon.jit
def store_rows(out, value, head, index, group, piece, HEADS: gl.constexpr, heads: gl.constexpr):
    """Store a piece of a head into [N, HEADS, D]."""
    ROW: gl.constexpr = heads.by_row
    row, live = rows_of(head, group, piece, ROW)
    column = gl.arange(0, D, layout=gl.SliceLayout(0, ROW))
    gl.store(out + (row.to(gl.int64) * HEADS + index)[:, None] * D + column[None, :], value, mask=live[:, None])


@gluon.jit
def rotated(sums, head, group, piece, scales, cos_sin, product: gl.constexpr, heads: gl.constexpr):
    """Return a piece of a head of q or k, normed and rotated."""
    ROW: gl.constexpr = heads.by_row
    PAIR: gl.constexpr = heads.by_pair
    value = values_of(sums, head, group, piece, scales, ROW, product, heads)
    which = head.expert * 2 + (head.index >= heads.q).to(gl.int32)
    norm = gl.load(scales.norm + which * D + gl.arange(0, D, layout=gl.SliceLayout(0, ROW))) + 1.0
    inverse = gl.rsqrt(gl.sum(value * value, axis=1) / D + EPS)
    a, b = gl.split(gl.reshape(value * inverse[:, None] * norm[None, :], (PIECE, D // 2, 2)))
    row, live = rows_of(head, group, piece, PAIR)
    at = cos_sin + row.to(gl.int64)[:, None] * D + gl.arange(0, D // 2, layout=gl.SliceLayout(0, PAIR))[None, :]
    cos = gl.convert_layout(gl.load(at, mask=live[:, None], other=0.0), a.type.layout)
    sin = gl.convert_layout(gl.load(at + D // 2, mask=live[:, None], other=0.0), a.type.layout)
    y = gl.reshape(gl.join(a * cos - b * sin, b * cos + a * sin), (PIECE, D))
    return gl.convert_layout(y, ROW)


@gluon.jit
def finish_qk(sums, head, scales, cos_sin, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish and store a head of q or k, in bf16 or e4m3."""
    which = head.expert * 2 + (head.index >= heads.q).to(gl.int32)
    if heads.fp8:
        scale = gl.load(scales.qk + which)
        if head.index == 0:
            gl.store(out.q_scale + head.first // (GROUPS * ROWS), scale)
        elif head.index == heads.q:
            gl.store(out.k_scale + head.first // (GROUPS * ROWS), scale)
    for group in range(GROUPS):
        for piece in range(PIECES):
            y = rotated(sums, head, group, piece, scales, cos_sin, product, heads)
            if heads.fp8:
                value = to_e4m3(y * (1.0 / scale))
            else:
                value = y.to(gl.bfloat16)
            if head.index < heads.q:
                store_rows(out.q, value, head, head.index, group, piece, heads.q, heads)
            else:
                store_rows(out.k, value, head, head.index - heads.q, group, piece, heads.kv, heads)


@gluon.jit
def finish_q_codes(sums, head, scales, cos_sin, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish a head of q, and store int8 codes of every row by its own maximum."""
    ROW: gl.constexpr = heads.by_row
    for group in range(GROUPS):
        for piece in range(PIECES):
            y = rotated(sums, head, group, piece, scales, cos_sin, product, heads)
            row, live = rows_of(head, group, piece, ROW)
            scale = int8_scale_of(largest(0, y, live).to(gl.float32, bitcast=True))
            store_rows(out.q, to_int8(y * (1.0 / scale)[:, None]), head, head.index, group, piece, heads.q, heads)
            gl.store(out.q_scale + row.to(gl.int64) * heads.q + head.index, scale, mask=live)


@gluon.jit
def finish_k_codes(sums, head, scales, cos_sin, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish a head of k, and store int8 codes of 128 rows by their maximum."""
    ROW: gl.constexpr = heads.by_row
    held = gl.full([PIECE], 0, gl.int32, layout=gl.SliceLayout(1, ROW))
    for group in range(GROUPS):
        for piece in range(PIECES):
            _, live = rows_of(head, group, piece, ROW)
            held = largest(held, rotated(sums, head, group, piece, scales, cos_sin, product, heads), live)
    scale = int8_scale_of(gl.max(held, axis=0).to(gl.float32, bitcast=True))
    gl.store(out.k_scale + (head.index - heads.q) * out.blocks + head.first // (GROUPS * ROWS), scale)
    for group in range(GROUPS):
        for piece in range(PIECES):
            y = rotated(sums, head, group, piece, scales, cos_sin, product, heads)
            store_rows(out.k, to_int8(y * (1.0 / scale)), head, head.index - heads.q, group, piece, heads.kv, heads)


@gluon.jit
def finish_v(sums, head, scales, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish and store a head of v in bf16."""
    ROW: gl.constexpr = heads.by_row
    for group in range(GROUPS):
        for piece in range(PIECES):
            value = values_of(sums, head, group, piece, scales, ROW, product, heads).to(gl.bfloat16)
            store_rows(out.v, value, head, head.index - heads.rotated, group, piece, heads.kv, heads)


@gluon.jit
def finish_v_codes(sums, head, scales, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish a head of v, and store e4m3 codes of 128 rows by their maximum, transposed and in fragment order.

    Rows past the end are 0. Token 8 i + 2 t + b of 16 goes to place 4 t + 2 i + b.
    """
    ROW: gl.constexpr = heads.by_row
    CHANNEL: gl.constexpr = heads.by_channel
    held = gl.full([PIECE], 0, gl.int32, layout=gl.SliceLayout(1, ROW))
    for group in range(GROUPS):
        for piece in range(PIECES):
            _, live = rows_of(head, group, piece, ROW)
            held = largest(held, values_of(sums, head, group, piece, scales, ROW, product, heads), live)
    scale = scale_of(gl.max(held, axis=0).to(gl.float32, bitcast=True))
    index = head.index - heads.rotated
    block = head.first // (GROUPS * ROWS)
    gl.store(out.v_scale + index * out.blocks + block, scale)
    slots = out.blocks * (GROUPS * ROWS)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, CHANNEL))
    place = gl.arange(0, PIECE, layout=gl.SliceLayout(1, CHANNEL))
    tile = out.v + (index * D + channel).to(gl.int64)[None, :] * slots + (block * (GROUPS * ROWS) + place)[:, None]
    for group in range(GROUPS):
        for piece in range(PIECES):
            _, live = rows_of(head, group, piece, CHANNEL)
            value = values_of(sums, head, group, piece, scales, CHANNEL, product, heads)
            codes = to_e4m3(gl.where(live[:, None], value, 0.0) * (1.0 / scale))
            codes = gl.reshape(gl.permute(gl.reshape(codes, (2, 4, 2, D)), (1, 0, 2, 3)), (PIECE, D))
            gl.store(tile + (group * ROWS + piece * PIECE), gl.convert_layout(codes, CHANNEL))


@gluon.jit
def finish_gates(sums, head, scales, out, product: gl.constexpr, heads: gl.constexpr):
    """Store the gates' sigmoids, a channel for each head of q."""
    ROW: gl.constexpr = heads.by_row
    gate = (head.index - heads.gates) * D + gl.arange(0, D, layout=gl.SliceLayout(0, ROW))
    for group in range(GROUPS):
        for piece in range(PIECES):
            value = values_of(sums, head, group, piece, scales, ROW, product, heads)
            row, live = rows_of(head, group, piece, ROW)
            place = out.gate + (row.to(gl.int64) * heads.q)[:, None] + gate[None, :]
            gl.store(place, 1.0 / (1.0 + gl.exp(-value)), mask=live[:, None] & (gate < heads.q)[None, :])


@gluon.jit
def finish_heads(sums, work, scales, cos_sin, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish, in the finishing warps, both heads of every tile, by their kind."""
    turn = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        expert, first, end, feature = tile_of(work, item, product)
        for group in range(GROUPS):
            await_sums(sums, group, turn)
        for half in range(HALVES):
            head = Head(half, feature // D + half, expert, first, end)
            if head.index < heads.rotated:
                if heads.int8_qk:
                    if head.index < heads.q:
                        finish_q_codes(sums, head, scales, cos_sin, out, product, heads)
                    else:
                        finish_k_codes(sums, head, scales, cos_sin, out, product, heads)
                else:
                    finish_qk(sums, head, scales, cos_sin, out, product, heads)
            elif head.index < heads.gates:
                if heads.fp8:
                    finish_v_codes(sums, head, scales, out, product, heads)
                else:
                    finish_v(sums, head, scales, out, product, heads)
            elif head.index < heads.all:
                finish_gates(sums, head, scales, out, product, heads)
        for group in range(GROUPS):
            release_sums(sums, group)
        turn += 1


@gluon.jit
def qkv_linear_beside_kernel(
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
    items,
    blocks,
    C: gl.constexpr,
    HQ: gl.constexpr,
    HKV: gl.constexpr,
    INT8: gl.constexpr,
    INT8_QK: gl.constexpr,
    FP8_OUT: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Compute x . weight and run its epilogue; ``tiles`` is the length of ``row_tiles``, ``items`` the product's tiles.

    x and weight are TMA descriptors as `residual_beside` takes them; with codes the operands have scales.
    """
    BITS: gl.constexpr = x.dtype.primitive_bitwidth
    heads: gl.constexpr = heads_of(HQ, HKV, BITS == 8, INT8_QK, FP8_OUT)
    product: gl.constexpr = product_of(heads.all * D, C, BITS, INT8, STAGES, GROUP_M)
    ring = make_operands(x, weight, product)
    sums = make_sums(product, 8)
    fence_async_shared()
    work = Work(row_tiles, tiles, items)
    common = (ring, sums, work)
    scales = Scales(x_scale, weight_scale, qk_norm, qk_scale)
    out = Results(q, k, v, q_scale, k_scale, v_scale, gate, blocks)
    gl.warp_specialize(
        [
            (multiply, (0, common, product)),
            (multiply, (1, common, product)),
            (finish_heads, (sums, work, scales, cos_sin, out, product, heads)),
            (load_operands, (x, weight, ring, work, product)),
        ],
        [4, FINISH_WARPS, 1],
        [MULTIPLY_REGISTERS, FINISH_REGISTERS, FINISH_REGISTERS],
    )
