"""QKV's product for Hopper in Gluon, with its epilogue beside the tensor cores; docs/OPS.md states tensors, rounding.

`product_beside` has the roles of a program. A tile is two heads of 128 channels. The two finishing warps read a head's
sums in the pieces of `qkv_pieces`, and load what the next piece needs before they finish one. int8 k and e4m3 v have a
scale per head and 128 rows, so their warps walk a head twice: once for its largest magnitude, once for its codes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from happyhorse_fast.kernels import numerics
from happyhorse_fast.kernels.product_beside import (
    EVEN_REGISTERS,
    GROUPS,
    HALVES,
    PIECE,
    PIECES,
    ROWS,
    Work,
    await_sums,
    product_of,
    release_sums,
    run,
    tile_of,
)
from happyhorse_fast.kernels.qkv_heads import Results, Scales, heads_of
from happyhorse_fast.kernels.qkv_pieces import (
    BY_CHANNEL,
    BY_ROW,
    D,
    Head,
    ahead_of,
    channels_of,
    factors_of,
    held_or,
    larger,
    largest,
    rotated,
    rounded,
    rows_of,
    store_rows,
    values_of,
    weights_of,
)

int8_scale_of = gluon.jit(numerics.int8_scale_of.fn)
scale_of = gluon.jit(numerics.scale_of.fn)
to_e4m3 = gluon.jit(numerics.to_e4m3.fn)


@gluon.jit
def largest_of(held):
    """Return the largest of a piece's rows, of which each thread gets all.

    A reduction over warps keeps a register that only some threads define. With int8 k and e4m3 v there are two, which
    spill (Triton 3.7.1).
    """
    return gl.reduce(gl.convert_layout(held, gl.SliceLayout(1, BY_CHANNEL)), 0, larger)


@gluon.jit
def finish_qk(sums, head, scales, cos_sin, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish and store a head of q or k, in bf16 or e4m3."""
    ahead = ahead_of(head, 0, scales, cos_sin, heads)
    channels = channels_of(head, scales, heads)
    which = head.expert * 2 + (head.index >= heads.q).to(gl.int32)
    if heads.fp8_v:
        scale = gl.load(scales.qk + which)
        if head.index == 0:
            gl.store(out.q_scale + head.first // (GROUPS * ROWS), scale)
        elif head.index == heads.q:
            gl.store(out.k_scale + head.first // (GROUPS * ROWS), scale)
    for piece in range(GROUPS * PIECES):
        loaded = ahead
        ahead = ahead_of(head, piece + 1, scales, cos_sin, heads)
        y, by = rotated(sums, head, piece, channels, loaded, product)
        if heads.fp8_v:
            value = to_e4m3(y * (by * (1.0 / scale))[:, None])
        else:
            value = (y * by[:, None]).to(gl.bfloat16)
        if head.index < heads.q:
            store_rows(out.q, value, head, head.index, piece, heads.q)
        else:
            store_rows(out.k, value, head, head.index - heads.q, piece, heads.kv)


@gluon.jit
def finish_q_codes(sums, head, scales, cos_sin, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish a head of q, and store int8 codes of every row by its own maximum."""
    ahead = ahead_of(head, 0, scales, cos_sin, heads)
    channels = channels_of(head, scales, heads)
    for piece in range(GROUPS * PIECES):
        loaded = ahead
        ahead = ahead_of(head, piece + 1, scales, cos_sin, heads)
        y, by = rotated(sums, head, piece, channels, loaded, product)
        row, live = rows_of(head, piece, BY_ROW)
        scale = int8_scale_of(largest(y) * by)
        store_rows(out.q, rounded(y * (by * (1.0 / scale))[:, None]), head, head.index, piece, heads.q)
        gl.store(out.q_scale + row.to(gl.int64) * heads.q + head.index, scale, mask=live)


@gluon.jit
def finish_k_codes(sums, head, scales, cos_sin, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish a head of k, and store int8 codes of 128 rows by their maximum."""
    COUNT: gl.constexpr = GROUPS * PIECES
    ahead = ahead_of(head, 0, scales, cos_sin, heads)
    channels = channels_of(head, scales, heads)
    held = gl.full([PIECE], 0.0, gl.float32, layout=gl.SliceLayout(1, BY_ROW))
    for piece in range(COUNT):
        loaded = ahead
        # Behind the last piece comes the first one again.
        ahead = ahead_of(head, (piece + 1) % COUNT, scales, cos_sin, heads)
        y, by = rotated(sums, head, piece, channels, loaded, product)
        _, live = rows_of(head, piece, BY_ROW)
        held = held_or(held, largest(y) * by, live)
    scale = int8_scale_of(largest_of(held))
    gl.store(out.k_scale + (head.index - heads.q) * out.blocks + head.first // (GROUPS * ROWS), scale)
    for piece in range(COUNT):
        loaded = ahead
        ahead = ahead_of(head, piece + 1, scales, cos_sin, heads)
        y, by = rotated(sums, head, piece, channels, loaded, product)
        codes = rounded(y * (by * (1.0 / scale))[:, None])
        store_rows(out.k, codes, head, head.index - heads.q, piece, heads.kv)


@gluon.jit
def finish_v(sums, head, scales, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish and store a head of v in bf16."""
    ahead = factors_of(head, 0, scales, BY_ROW, heads)
    weights = weights_of(head, scales, BY_ROW, heads)
    for piece in range(GROUPS * PIECES):
        factor = ahead * product.up
        ahead = factors_of(head, piece + 1, scales, BY_ROW, heads)
        value = (values_of(sums, head, piece, weights, BY_ROW) * factor[:, None]).to(gl.bfloat16)
        store_rows(out.v, value, head, head.index - heads.rotated, piece, heads.kv)


@gluon.jit
def finish_v_codes(sums, head, scales, out, product: gl.constexpr, heads: gl.constexpr):
    """Finish a head of v, and store e4m3 codes of 128 rows by their maximum, transposed and in fragment order.

    Rows past the end are 0. Token 8 i + 2 t + b of 16 goes to place 4 t + 2 i + b.
    """
    ahead = factors_of(head, 0, scales, BY_ROW, heads)
    weights = weights_of(head, scales, BY_ROW, heads)
    held = gl.full([PIECE], 0.0, gl.float32, layout=gl.SliceLayout(1, BY_ROW))
    for piece in range(GROUPS * PIECES):
        factor = ahead * product.up
        ahead = factors_of(head, piece + 1, scales, BY_ROW, heads)
        _, live = rows_of(head, piece, BY_ROW)
        held = held_or(held, largest(values_of(sums, head, piece, weights, BY_ROW)) * factor, live)
    weights = weights_of(head, scales, BY_CHANNEL, heads)
    scale = scale_of(largest_of(held))
    index = head.index - heads.rotated
    block = head.first // (GROUPS * ROWS)
    gl.store(out.v_scale + index * out.blocks + block, scale)
    slots = out.blocks * (GROUPS * ROWS)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, BY_CHANNEL))
    place = gl.arange(0, PIECE, layout=gl.SliceLayout(1, BY_CHANNEL))
    tile = out.v + (index * D + channel).to(gl.int64)[None, :] * slots + (block * (GROUPS * ROWS) + place)[:, None]
    for piece in range(GROUPS * PIECES):
        # Not a piece ahead: 16 rows a thread have 16 scales, for which there are no registers.
        factor = factors_of(head, piece, scales, BY_CHANNEL, heads) * (product.up * (1.0 / scale))
        _, live = rows_of(head, piece, BY_CHANNEL)
        value = values_of(sums, head, piece, weights, BY_CHANNEL) * factor[:, None]
        codes = to_e4m3(gl.where(live[:, None], value, 0.0))
        codes = gl.reshape(gl.permute(gl.reshape(codes, (2, 4, 2, D)), (1, 0, 2, 3)), (PIECE, D))
        gl.store(tile + piece * PIECE, gl.convert_layout(codes, BY_CHANNEL))


@gluon.jit
def finish_gates(sums, head, scales, out, product: gl.constexpr, heads: gl.constexpr):
    """Store the gates' sigmoids, a channel for each head of q."""
    ahead = factors_of(head, 0, scales, BY_ROW, heads)
    weights = weights_of(head, scales, BY_ROW, heads)
    gate = (head.index - heads.gates) * D + gl.arange(0, D, layout=gl.SliceLayout(0, BY_ROW))
    for piece in range(GROUPS * PIECES):
        factor = ahead * product.up
        ahead = factors_of(head, piece + 1, scales, BY_ROW, heads)
        value = values_of(sums, head, piece, weights, BY_ROW) * factor[:, None]
        row, live = rows_of(head, piece, BY_ROW)
        at = out.gate + (row.to(gl.int64) * heads.q)[:, None] + gate[None, :]
        gl.store(at, 1.0 / (1.0 + gl.exp(-value)), mask=live[:, None] & (gate < heads.q)[None, :])


@gluon.jit
def finish_heads(sums, work, given, heads: gl.constexpr, product: gl.constexpr):
    """Finish, in the finishing warps, both heads of every tile, by their kind."""
    scales, cos_sin, out = given
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
                if heads.fp8_v:
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
    FP8_V: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Compute x . weight and run its epilogue; ``tiles`` is the length of ``row_tiles``, ``items`` the product's tiles.

    x and weight are TMA descriptors as `residual_beside` takes them; with codes the operands have scales.
    """
    BITS: gl.constexpr = x.dtype.primitive_bitwidth
    heads: gl.constexpr = heads_of(HQ, HKV, D, BITS == 8, INT8_QK, FP8_V)
    product: gl.constexpr = product_of(heads.all * D, C, BITS, INT8, STAGES, GROUP_M)
    scales = Scales(x_scale, weight_scale, qk_norm, qk_scale)
    given = (scales, cos_sin, Results(q, k, v, q_scale, k_scale, v_scale, gate, blocks))
    work = Work(row_tiles, tiles, items)
    run(x, weight, work, finish_heads, given, heads, 8, EVEN_REGISTERS, EVEN_REGISTERS, product)
