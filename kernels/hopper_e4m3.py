"""Attention of one item with P and v in e4m3 and a running maximum: a part of the Hopper kernel.

q and k are e4m3 too, or int8. int8's scores have their maximum found in int32, two of them to an instruction (VIMNMX3):
492 instructions a step with their 64 conversions, 454 in e4m3. Masks then put HIDDEN in scores and -inf in exponents:
as float32 from the start scores spill 240 to 504 bytes.

P needs the maximum: without it P would spread over more powers of two than e4m3 has. v's scale of a block is folded
into P's exponent: P is 2^8 * 2^(s - m), where s is the score plus log2 of v's scale, and m is the largest s. So PV of a
block needs no multiplication by v's scale. It is still added to the accumulator in float32: the tensor cores' own sum
of e4m3 products keeps 13 fraction bits, and over the 502 blocks of a 1080p clip a channel whose mean is half its spread
loses a third (tests/emulators/test_wgmma_accumulator.py).

QK of the next block is issued before the softmax of this one, into other registers, so QK is not in the way of a step.
The loop over full blocks has two steps, since scores change registers: one step moves 64 of them. The one over partial
blocks, of which there are few, has one, for want of registers.

The groups take turns at PV and the QK that follows it: while one's products run, the other computes exponents. Measured
dense on an H100, in turns of half a second: 848 TFLOP/s, 746 where a turn is PV alone, 765 without turns; and 741 to
823 with QK and PV issued together before the softmax (docs/kernels/attention.md).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from happyhorse_fast.kernels.attention import P_EXPONENT
from happyhorse_fast.kernels.hopper_barriers import await_turn, pass_turn
from happyhorse_fast.kernels.hopper_ring import await_full, hold_order, release
from happyhorse_fast.kernels.hopper_scores import HIDDEN, hide, start_qk
from happyhorse_fast.kernels.numerics import SMALLEST_SCALE


class Running(NamedTuple):
    """State between two steps, when no product is under way.

    ``k_scale`` and ``v_scale`` are of the next step's block, ``column`` is the block after it. ``row_sum`` is each
    thread's over its own columns, [rows, 4].
    """

    acc: Any
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
def pinned(x):
    """Return x by a shuffle of each thread with itself: ptxas moves none over a branch, nor what needs its result.

    Without it the sums end between the end of PV and the next QK. ptxas sees through it where all threads hold the same
    number.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=f,f", [x], gl.float32, False, 1
    )


@gluon.jit
def sums(p, sizes: gl.constexpr):
    """Return each thread's sum over its own columns, [rows, 4]."""
    return gl.sum(gl.sum(gl.reshape(p, (sizes.rows, sizes.block // 8, 4, 2)), axis=3), axis=1)


@gluon.jit
def at_least(v_scale):
    """Raise a block's scale of v to SMALLEST_SCALE, which the package's are at least; NaN stays."""
    return gl.where(v_scale < SMALLEST_SCALE, SMALLEST_SCALE, v_scale)


@gluon.jit
def softmax(running, s, scores, GUARDED: gl.constexpr, sizes: gl.constexpr):
    """Run one step of the online softmax in base 2: (P, packed, the accumulator's factor, row_sum, row_max).

    GUARDED: rows may have had no key so far, and keys may be hidden.
    """
    scale = scores * running.k_scale
    log_v, per_v = log2_and_reciprocal(at_least(running.v_scale))
    most = gl.max(s, axis=1)
    largest = most.to(gl.float32) * scale
    if sizes.int8:
        scale = scale[:, None]
        if GUARDED:
            largest = gl.where(most == HIDDEN, -float("inf"), largest)
    row_max = gl.maximum(running.row_max, largest + log_v)
    shift = row_max
    if GUARDED:  # in a row without a key so far -inf - -inf would be NaN
        shift = gl.where(row_max == -float("inf"), 0.0, row_max)
    t = s.to(gl.float32) * scale - (shift - P_EXPONENT - log_v)[:, None]
    if sizes.int8 and GUARDED:
        t = gl.where(s == HIDDEN, -float("inf"), t)
    p = gl.exp2(t)
    alpha = gl.exp2(running.row_max - shift)
    row_sum = running.row_sum * per_thread(alpha, running.row_sum) + sums(p, sizes) * per_v
    return packed(p, sizes), alpha, pinned(row_sum), row_max


@gluon.jit
def start_pv(words, dead, rings, stage, sizes: gl.constexpr):
    """Issue PV of packed P into the registers of ``dead``, the block's scores, where there are as many of them.

    Scores of two blocks, the accumulator and PV would be 256 registers. Left to itself ptxas spills 352 bytes.
    """
    v = rings.v.tiles.index(stage).permute((1, 0))
    if sizes.d == sizes.block:
        into = dead.to(gl.float32, bitcast=True)
    else:
        into = gl.full([sizes.rows, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
    return warpgroup_mma(operand(words, sizes), v, into, use_acc=False, is_async=True)


@gluon.jit
def add_pv(running, pv, alpha, sizes: gl.constexpr):
    """Return the accumulator, rescaled to the new maximum, plus a finished PV."""
    return running.acc * gl.convert_layout(alpha, sizes.o_row)[:, None] + pv


@gluon.jit
def advance(
    running,
    s,
    use,
    at,
    last,
    item,
    rings,
    work,
    scales,
    GROUP: gl.constexpr,
    MASKED: gl.constexpr,
    sizes: gl.constexpr,
):
    """Run one step: QK of the block after ``at``, softmax and PV of block ``at``, of which ``s`` are the scores.

    ``last`` is the last listed block. Returns the state and the scores of the block after ``at``.
    """
    next_k = gl.load(scales.k + running.column)
    next_v = gl.load(scales.v + running.column)
    next_column = gl.load(work.columns + gl.minimum(at + 2, last))
    stage = await_full(rings.k, use + 1, sizes.stages)
    s_pending = start_qk(item.q_tile, rings.k, stage, sizes)
    pass_turn(GROUP)
    hold_order(rings)
    if MASKED:
        s = hide(s, work, at, GROUP * sizes.rows, sizes)
    p, alpha, row_sum, row_max = softmax(running, s, scales.scores, MASKED, sizes)
    own = await_full(rings.v, use, sizes.stages)
    await_turn(GROUP)
    pv_pending = start_pv(p, s, rings, own, sizes)
    pv, next_s = warpgroup_mma_wait(0, deps=[pv_pending, s_pending])
    acc = add_pv(running, pv, alpha, sizes)
    release(rings.k, stage)
    return Running(acc, row_sum, row_max, next_k, next_v, next_column), next_s


@gluon.jit
def attend_e4m3(item, use, rings, work, scales, GROUP: gl.constexpr, sizes: gl.constexpr):
    """Attend to all listed blocks of an item, at least one: (accumulator, sum of P, maximum).

    Accumulator and sum are of P times 2^8.
    """
    start = item.start
    last = start + item.n_all - 1
    column = gl.load(work.columns + start)
    k_scale = gl.load(scales.k + column)
    v_scale = gl.load(scales.v + column)
    column = gl.load(work.columns + gl.minimum(start + 1, last))
    acc = gl.full([sizes.rows, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
    row_sum = sums(gl.full([sizes.rows, sizes.block], 0.0, gl.float32, layout=sizes.s_layout), sizes)
    row_max = gl.full([sizes.rows], -float("inf"), gl.float32, layout=sizes.s_row)
    running = Running(acc, row_sum, row_max, k_scale, v_scale, column)
    stage = await_full(rings.k, use, sizes.stages)
    s = warpgroup_mma_wait(0, deps=[start_qk(item.q_tile, rings.k, stage, sizes)])
    release(rings.k, stage)
    await_turn(GROUP)
    full = gl.minimum(item.n_full, item.n_all - 1)
    for pair in range(full // 2):
        a, b = use + pair * 2, start + pair * 2
        running, other_s = advance(running, s, a, b, last, item, rings, work, scales, GROUP, False, sizes)
        running, s = advance(running, other_s, a + 1, b + 1, last, item, rings, work, scales, GROUP, False, sizes)
    if full % 2 == 1:
        a, b = use + full - 1, start + full - 1
        running, s = advance(running, s, a, b, last, item, rings, work, scales, GROUP, False, sizes)
    for j in range(full, item.n_all - 1):
        running, s = advance(running, s, j + use, j + start, last, item, rings, work, scales, GROUP, True, sizes)
    pass_turn(GROUP)
    if item.n_full < item.n_all:
        s = hide(s, work, last, GROUP * sizes.rows, sizes)
    p, alpha, row_sum, row_max = softmax(running, s, scales.scores, True, sizes)
    own = await_full(rings.v, use + item.n_all - 1, sizes.stages)
    await_turn(GROUP)
    pv_pending = start_pv(p, s, rings, own, sizes)
    pass_turn(GROUP)
    acc = add_pv(running, warpgroup_mma_wait(0, deps=[pv_pending]), alpha, sizes)
    row_sum = gl.convert_layout(gl.sum(row_sum, axis=1), sizes.s_row)
    return acc, row_sum, row_max
