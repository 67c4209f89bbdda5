"""Attention of one item in the Hopper kernel: the order of a step, the same in every format.

QK of the next block is issued before the softmax of this one, into other registers, so that all of the softmax runs
beside this group's own QK and the other group's products. PV alone holds a group up: a warp does not pass a product
whose left operand is in registers until the tensor cores have read it. So little stands between the end of PV and the
next QK. The loop over full blocks has two steps, since scores change registers: one step moves 64 of them. The one over
partial blocks, of which there are few, has one, for want of registers.

Both products are awaited at the end of a step, so none is under way between two steps, and a group arrives once: for k
of the next block, whose scores are there, and for v of this one.

The groups take turns at PV. A turn is passed as soon as PV is issued, which a warp gets to when PV is all but read: so
neither PV slows the other down, and the groups stay at least a PV apart. Played through in e4m3 without turns, some
builds fall in step, with 2110 cycles for 1600.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from happyhorse_fast.kernels.hopper_barriers import await_turn, pass_turn
from happyhorse_fast.kernels.hopper_bounded import exponents, no_sums_bounded, softmax_bounded, start_pv_bounded
from happyhorse_fast.kernels.hopper_e4m3 import add_pv, no_sums_e4m3, softmax_e4m3, start_pv_e4m3
from happyhorse_fast.kernels.hopper_order import hold_order, pinned
from happyhorse_fast.kernels.hopper_ring import await_full, release
from happyhorse_fast.kernels.hopper_scores import hide, start_qk


class Running(NamedTuple):
    """State between two steps.

    ``row_sum`` is each thread's over its own columns, [rows, 4]. ``other`` is the same of P before rounding, for an
    LSE, or in e4m3 the running maximum. ``scores`` is the factor of all scores. ``k_scale`` and ``v_scale`` are of the
    next step's block, ``column`` is the block after it.
    """

    acc: Any
    row_sum: Any
    other: Any
    scores: Any
    k_scale: Any
    v_scale: Any
    column: Any


@gluon.jit
def scale_of(of_blocks, column, SCALED: gl.constexpr):
    """Return the scale of a block of k or v, 1 in a format that has none."""
    scale = 1.0
    if SCALED:
        scale = gl.load(of_blocks + column)
    return scale


@gluon.jit
def column_of(work, at, sizes: gl.constexpr):
    """Return the column of a listed block, by which its scales are read; 0 in bf16, which has none."""
    column = 0
    if sizes.q_bits == 8:
        column = gl.load(work.columns + at)
    return column


@gluon.jit
def scaled(s, scores, k_scale, sizes: gl.constexpr):
    """Return a block's scores as its softmax takes them. Masks come after this."""
    if sizes.e4m3:
        t = s
    else:
        t = exponents(s, scores, k_scale, sizes)
    return t


@gluon.jit
def softmax(running, t, GUARDED: gl.constexpr, sizes: gl.constexpr):
    """Return (packed P, the factor of the accumulator, row_sum, other). GUARDED: rows may have had no key so far."""
    if sizes.e4m3:
        p, factor, row_sum, other = softmax_e4m3(running, t, GUARDED, sizes)
    else:
        p, row_sum, other = softmax_bounded(running, t, sizes)
        factor = 1.0
    return p, factor, row_sum, other


@gluon.jit
def start_pv(running, p, s, rings, use, GROUP: gl.constexpr, sizes: gl.constexpr):
    """Issue PV of the packed ``p`` without waiting for it. The scores ``s`` are not used any more."""
    stage = await_full(rings.v, use, sizes.stages)
    await_turn(GROUP)
    if sizes.e4m3:
        pending = start_pv_e4m3(p, s, rings.v, stage, sizes)
    else:
        pending = start_pv_bounded(p, running.acc, rings.v, stage, sizes)
    pass_turn(GROUP)
    return pending


@gluon.jit
def added(running, pv, factor, sizes: gl.constexpr):
    """Return the accumulator with a finished PV."""
    if sizes.e4m3:
        acc = add_pv(running, pv, factor, sizes)
    else:
        acc = pv
    return acc


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
    next_k = scale_of(scales.k, running.column, sizes.q_bits == 8)
    next_v = scale_of(scales.v, running.column, sizes.e4m3)
    next_column = column_of(work, gl.minimum(at + 2, last), sizes)
    stage = await_full(rings.k, use + 1, sizes.stages)
    s_pending = start_qk(item.q_tile, rings.k, stage, sizes)
    hold_order(rings)
    scores = running.scores
    if not sizes.e4m3:
        scores = pinned(scores)
    t = scaled(s, scores, running.k_scale, sizes)
    if MASKED:
        t = hide(t, work, at, GROUP * sizes.rows, sizes)
    p, factor, row_sum, other = softmax(running, t, MASKED, sizes)
    row_sum = pinned(row_sum)
    if sizes.lse and not sizes.e4m3:
        other = pinned(other)
    pv_pending = start_pv(running, p, s, rings, use, GROUP, sizes)
    pv, next_s = warpgroup_mma_wait(0, deps=[pv_pending, s_pending])
    acc = added(running, pv, factor, sizes)
    release(rings.k, stage)
    return Running(acc, row_sum, other, scores, next_k, next_v, next_column), next_s


@gluon.jit
def attend(item, use, rings, work, scales, GROUP: gl.constexpr, sizes: gl.constexpr):
    """Attend to all listed blocks of an item, at least one: (accumulator, sum of P, `Running.other`), of each row.

    In e4m3 accumulator and sum are of P times 2^8.
    """
    start = item.start
    last = start + item.n_all - 1
    column = column_of(work, start, sizes)
    k_scale = scale_of(scales.k, column, sizes.q_bits == 8)
    v_scale = scale_of(scales.v, column, sizes.e4m3)
    column = column_of(work, gl.minimum(start + 1, last), sizes)
    acc = gl.full([sizes.rows, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
    if sizes.e4m3:
        row_sum = no_sums_e4m3(sizes)
        other = gl.full([sizes.rows], -float("inf"), gl.float32, layout=sizes.s_row)
    else:
        row_sum = no_sums_bounded(sizes)
        other = row_sum if sizes.lse else 0.0
    running = Running(acc, row_sum, other, scales.scores, k_scale, v_scale, column)
    stage = await_full(rings.k, use, sizes.stages)
    s = warpgroup_mma_wait(0, deps=[start_qk(item.q_tile, rings.k, stage, sizes)])
    release(rings.k, stage)
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
    release(rings.q, item.q_slot)
    t = scaled(s, running.scores, running.k_scale, sizes)
    if item.n_full < item.n_all:
        t = hide(t, work, last, GROUP * sizes.rows, sizes)
    p, factor, row_sum, other = softmax(running, t, True, sizes)
    pv = warpgroup_mma_wait(0, deps=[start_pv(running, p, s, rings, use + item.n_all - 1, GROUP, sizes)])
    acc = added(running, pv, factor, sizes)
    row_sum = gl.convert_layout(gl.sum(row_sum, axis=1), sizes.s_row)
    if not sizes.e4m3:
        other = gl.convert_layout(gl.sum(other, axis=1), sizes.s_row) if sizes.lse else row_sum
    return acc, row_sum, other
