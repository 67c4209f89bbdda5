"""Attention of one item in e4m3, with a running maximum: a part of the Hopper kernel.

P needs the maximum: without it P would spread over more powers of two than e4m3 has. v's scale of a block is folded
into P's exponent: P is 2^8 * 2^(s - m), where s is the score plus log2 of v's scale, and m is the largest s. So PV of a
block needs no multiplication by v's scale. It is still added to the accumulator in float32: the tensor cores' own sum
of e4m3 products keeps 13 fraction bits, and over the 502 blocks of a 1080p clip a channel whose mean is half its spread
loses a third (tests/emulators/test_wgmma_accumulator.py).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from happyhorse_fast.kernels.attention import P_EXPONENT
from happyhorse_fast.kernels.hopper_ring import await_full, hold_order, release
from happyhorse_fast.kernels.hopper_scores import hide, start_qk

LEAST_V_SCALE = gl.constexpr(2.0**-96)
"""A smaller scale of v is raised to this. Sums of P are divided by the scale, and 2^(96 + 8) times 2^20 keys fits
float32. The result is off by less than 448 * 2^-96."""


class Running(NamedTuple):
    """State between two steps. PV of the packed ``p`` is not issued yet; ``acc`` times ``alpha`` will be added to it.

    ``k_scale`` and ``v_scale`` are of the next block, ``column`` is the block after it.
    """

    acc: Any
    p: Any
    alpha: Any
    row_sum: Any
    row_max: Any
    k_scale: Any
    v_scale: Any
    column: Any


@gluon.jit
def packed(p, sizes: gl.constexpr):
    """Pack P as e4m3, four columns to a 32-bit word, in v's fragment order (docs/OPS.md). No value changes threads."""
    by_token = gl.permute(gl.reshape(p, (sizes.rows, sizes.block // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    even, odd = gl.split(gl.reshape(by_token, (sizes.rows, sizes.block // 4, 2, 2)))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; "
        "mov.b32 $0, {l, h};}",
        "=r,f,f,f,f",
        [a, b, c, d],
        gl.int32,
        True,
        1,
    )


@gluon.jit
def operand(words, sizes: gl.constexpr):
    """Return packed P as PV's left operand. All four columns of a word pass it to the assembly, which uses one."""
    two = gl.join(words, words)
    four = gl.reshape(gl.join(two, two), (sizes.rows, sizes.block))
    codes = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [gl.convert_layout(four, sizes.p_layout)], gl.int8, True, 4
    )
    return codes.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def per_thread(x, like):
    """Convert one number per row to the layout of ``like``, the sums of :func:`softmax`, [rows, 1]."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def log2_and_reciprocal(x):
    """Return log2(x) and 1 / x of a normal float32 by one instruction each: `gl.log2` and a division take 20."""
    log = gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)
    return log, gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def softmax(s, row_max, scores, k_scale, v_scale, MASKED: gl.constexpr, sizes: gl.constexpr):
    """Run one step of the online softmax in base 2: (p, alpha, sums of each thread's columns [rows, 4], row_max)."""
    scale = scores * k_scale
    log_v, per_v = log2_and_reciprocal(v_scale)
    new_max = gl.maximum(row_max, gl.max(s, axis=1) * scale + log_v)
    shift = new_max
    if MASKED:  # in a row without a key so far -inf - -inf would be NaN
        shift = gl.where(new_max == -float("inf"), 0.0, new_max)
    p = gl.exp2(s * scale - (shift - P_EXPONENT - log_v)[:, None])
    total = gl.sum(gl.sum(gl.reshape(p, (sizes.rows, sizes.block // 8, 4, 2)), axis=3), axis=1)
    return p, gl.exp2(row_max - shift), total * per_v, new_max


@gluon.jit
def start_pv(running, v_ring, stage, sizes: gl.constexpr):
    """Issue PV of the packed P without waiting for it."""
    zero = gl.full([sizes.rows, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
    v = v_ring.tiles.index(stage).permute((1, 0))
    return warpgroup_mma(operand(running.p, sizes), v, zero, use_acc=False, is_async=True)


@gluon.jit
def add_pv(running, pv, sizes: gl.constexpr):
    """Return the accumulator, rescaled to the new maximum, plus a finished PV."""
    return running.acc * gl.convert_layout(running.alpha, sizes.o_row)[:, None] + pv


@gluon.jit
def at_least(v_scale):
    """Raise a block's scale of v to LEAST_V_SCALE where it is smaller; NaN stays."""
    return gl.where(v_scale < LEAST_V_SCALE, LEAST_V_SCALE, v_scale)


@gluon.jit
def advance(running, use, at, last, item, rings, work, scales, first, MASKED: gl.constexpr, sizes: gl.constexpr):
    """Run one step: QK and softmax of block ``at``, PV of the block before it. ``last`` is the last listed block.

    QK is issued, then PV, and the softmax overlaps with PV, as in `hopper_bounded.advance`. S, PV, the accumulator and
    P take 208 registers of 240, so a mask, or what an LSE keeps for later, would spill. In those steps PV is issued
    first and added to the accumulator while QK runs; only the other group's products overlap with the softmax.
    """
    BESIDE: gl.constexpr = not MASKED and not sizes.lse
    stage = await_full(rings.k, use, sizes.stages)
    before = await_full(rings.v, use - 1, sizes.stages)
    if BESIDE:
        s_pending = start_qk(item.q_tile, rings.k, stage, sizes)
        pv_pending = start_pv(running, rings.v, before, sizes)
        s = warpgroup_mma_wait(1, deps=[s_pending])
    else:
        pv_pending = start_pv(running, rings.v, before, sizes)
        s_pending = start_qk(item.q_tile, rings.k, stage, sizes)
        acc = add_pv(running, warpgroup_mma_wait(1, deps=[pv_pending]), sizes)
        s = warpgroup_mma_wait(0, deps=[s_pending])
        release(rings.k, stage)
    if MASKED:
        s = hide(s, work, at, first, sizes)
    p, alpha, total, row_max = softmax(
        s, running.row_max, scales.scores, running.k_scale, at_least(running.v_scale), MASKED, sizes
    )
    if BESIDE:
        hold_order(rings)
        acc = add_pv(running, warpgroup_mma_wait(0, deps=[pv_pending]), sizes)
        release(rings.k, stage)
    # Loaded here, where PV's registers are free again; the next step uses them after its QK.
    next_k = gl.load(scales.k + running.column)
    next_v = gl.load(scales.v + running.column)
    next_column = gl.load(work.columns + gl.minimum(at + 2, last))
    row_sum = running.row_sum * per_thread(alpha, running.row_sum) + total
    return Running(acc, packed(p, sizes), alpha, row_sum, row_max, next_k, next_v, next_column)


@gluon.jit
def attend_e4m3(item, use, rings, work, scales, first, sizes: gl.constexpr):
    """Attend to all listed blocks of an item, at least one: (accumulator, sum of P, maximum).

    Accumulator and sum are of P times 2^8.
    """
    zero = gl.full([sizes.rows, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
    row_max = gl.full([sizes.rows], -float("inf"), gl.float32, layout=sizes.s_row)
    last = item.start + item.n_all - 1
    column = gl.load(work.columns + item.start)
    k_scale = gl.load(scales.k + column)
    v_scale = at_least(gl.load(scales.v + column))
    column = gl.load(work.columns + gl.minimum(item.start + 1, last))
    next_k = gl.load(scales.k + column)
    next_v = gl.load(scales.v + column)
    column = gl.load(work.columns + gl.minimum(item.start + 2, last))
    stage = await_full(rings.k, use, sizes.stages)
    s = warpgroup_mma_wait(0, deps=[start_qk(item.q_tile, rings.k, stage, sizes)])
    release(rings.k, stage)
    if item.n_full == 0:
        s = hide(s, work, item.start, first, sizes)
    p, alpha, row_sum, row_max = softmax(s, row_max, scales.scores, k_scale, v_scale, True, sizes)
    running = Running(zero, packed(p, sizes), alpha, row_sum, row_max, next_k, next_v, column)
    for j in range(1, item.n_full):
        running = advance(running, j + use, j + item.start, last, item, rings, work, scales, first, False, sizes)
    for j in range(gl.maximum(item.n_full, 1), item.n_all):
        running = advance(running, j + use, j + item.start, last, item, rings, work, scales, first, True, sizes)
    before = await_full(rings.v, use + item.n_all - 1, sizes.stages)
    acc = add_pv(running, warpgroup_mma_wait(0, deps=[start_pv(running, rings.v, before, sizes)]), sizes)
    row_sum = gl.convert_layout(gl.sum(running.row_sum, axis=1), sizes.s_row)
    return acc, row_sum, running.row_max
