"""Attention of one item with a bounded softmax, for bf16 and for int8 q and k: a part of the Hopper kernel.

No score can leave float32's range as a power of two (`attention.score_bound`), so p = exp2(s * scale): no maximum is
found, shared between threads or corrected for. Row sums stay per thread, four to a row, until an item's end. P is
rounded to bf16 and summed after that, because the largest P of a row is not 1: a row of one key must be that key's v.

P is packed twice: once to round it, and once more, exactly, for PV. What is computed behind the end of PV delays the
next products: with the sums there a tile took 2740 cycles of an SM of an H200, without any rounding 2400. But a word
that is packed before it is PV's own register while PV reads it: ptxas waits for every single product, 4320 cycles.

The two groups take turns at issuing products. One's QK and PV run while the other computes exponents; without turns
both come to need the tensor cores at the same time (docs/kernels/attention.md).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from happyhorse_fast.kernels.hopper_barriers import await_turn, pass_turn
from happyhorse_fast.kernels.hopper_ring import Q_SLOTS, await_full, release
from happyhorse_fast.kernels.hopper_scores import hide, start_qk


class Running(NamedTuple):
    """Between two steps: PV of the packed ``p`` is yet to come; k's scale and the column are of the next two blocks."""

    acc: Any
    p: Any
    row_sum: Any
    log_sum: Any
    k_scale: Any
    column: Any


@gluon.jit
def packed(even, odd):
    """Two columns of P as bf16 in a 32-bit word: as 64 values of 16 bits ptxas would carry it in 64 registers."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], gl.int32, True, 1)


@gluon.jit
def rounded(p, sizes: gl.constexpr):
    """P rounded to bf16, as float32: (even columns, odd columns). A bf16 is a float32 whose lower half is 0."""
    even, odd = gl.split(gl.reshape(p, (sizes.rows, sizes.block // 2, 2)))
    words = packed(even, odd)
    return (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def operand(words, sizes: gl.constexpr):
    """PV's operand of packed P. Each word is given for both of its columns, of which the assembly takes one."""
    both = gl.reshape(gl.join(words, words), (sizes.rows, sizes.block))
    halves = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r", [gl.convert_layout(both, sizes.p_layout)], gl.int16, True, 2
    )
    return halves.to(gl.bfloat16, bitcast=True)


@gluon.jit
def sums(even, odd, sizes: gl.constexpr):
    """Sums of a thread's columns, [rows, 4]."""
    return gl.sum(gl.reshape(even + odd, (sizes.rows, sizes.block // 8, 4)), axis=1)


@gluon.jit
def sums_unrounded(p, sizes: gl.constexpr):
    """Sums of a thread's columns, [rows, 4], for an LSE."""
    even, odd = gl.split(gl.reshape(p, (sizes.rows, sizes.block // 2, 2)))
    return sums(even, odd, sizes)


@gluon.jit
def scaled(s, scales, k_scale, sizes: gl.constexpr):
    """Scores in powers of two. They are masked after this: a scale may round to 0, and -inf * 0 is NaN."""
    if sizes.int8:
        t = s.to(gl.float32) * (scales.scores * k_scale)[:, None]
    else:
        t = s * scales.scores
    return t


@gluon.jit
def scale_of(k_scales, column, sizes: gl.constexpr):
    """k's scale of a block; bf16 has none."""
    scale = 1.0
    if sizes.int8:
        scale = gl.load(k_scales + column)
    return scale


@gluon.jit
def column_of(work, at, sizes: gl.constexpr):
    """A listed block, where its scale will be wanted."""
    column = 0
    if sizes.int8:
        column = gl.load(work.columns + at)
    return column


@gluon.jit
def advance(
    running,
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
    """PV of the block before this one, QK and softmax of this one; ``last`` is the last listed block.

    The queries are awaited once more before the end of PV: a wait is a loop, and ptxas moves nothing across one.
    Without it the exponents end up behind PV (ptxas of CUDA 12.8), where nothing of this group runs beside them.
    """
    next_scale = scale_of(scales.k, running.column, sizes)
    next_column = column_of(work, gl.minimum(at + 2, last), sizes)
    stage = await_full(rings.k, use, sizes.stages)
    before = await_full(rings.v, use - 1, sizes.stages)
    await_turn(GROUP)
    s_pending = start_qk(item.q_tile, rings.k, stage, sizes)
    pv_pending = warpgroup_mma(operand(running.p, sizes), rings.v.tiles.index(before), running.acc, is_async=True)
    pass_turn(GROUP)
    s = warpgroup_mma_wait(1, deps=[s_pending])
    t = scaled(s, scales, running.k_scale, sizes)
    if MASKED:
        t = hide(t, work, at, GROUP * sizes.rows, sizes)
    p = gl.exp2(t)
    log_sum = running.log_sum
    if sizes.lse:
        log_sum += sums_unrounded(p, sizes)
    even, odd = rounded(p, sizes)
    row_sum = running.row_sum + sums(even, odd, sizes)
    await_full(rings.q, item.turn, Q_SLOTS)
    acc = warpgroup_mma_wait(0, deps=[pv_pending])
    release(rings.k, stage)
    return Running(acc, packed(even, odd), row_sum, log_sum, next_scale, next_column)


@gluon.jit
def attend_bounded(item, use, rings, work, scales, GROUP: gl.constexpr, sizes: gl.constexpr):
    """All blocks of an item, of which there is one: (accumulator, sum of rounded P, sum of P for an LSE)."""
    zero = gl.full([sizes.rows, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
    last = item.start + item.n_all - 1
    k_scale = scale_of(scales.k, column_of(work, item.start, sizes), sizes)
    next_scale = scale_of(scales.k, column_of(work, gl.minimum(item.start + 1, last), sizes), sizes)
    next_column = column_of(work, gl.minimum(item.start + 2, last), sizes)
    stage = await_full(rings.k, use, sizes.stages)
    s = warpgroup_mma_wait(0, deps=[start_qk(item.q_tile, rings.k, stage, sizes)])
    release(rings.k, stage)
    t = scaled(s, scales, k_scale, sizes)
    if item.n_full == 0:
        t = hide(t, work, item.start, GROUP * sizes.rows, sizes)
    p = gl.exp2(t)
    log_sum = sums_unrounded(p, sizes) if sizes.lse else 0.0
    even, odd = rounded(p, sizes)
    running = Running(zero, packed(even, odd), sums(even, odd, sizes), log_sum, next_scale, next_column)
    for j in range(1, item.n_full):
        running = advance(running, j + use, j + item.start, last, item, rings, work, scales, GROUP, False, sizes)
    for j in range(gl.maximum(item.n_full, 1), item.n_all):
        running = advance(running, j + use, j + item.start, last, item, rings, work, scales, GROUP, True, sizes)
    before = await_full(rings.v, use + item.n_all - 1, sizes.stages)
    v = rings.v.tiles.index(before)
    acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(operand(running.p, sizes), v, running.acc, is_async=True)])
    row_sum = gl.convert_layout(gl.sum(running.row_sum, axis=1), sizes.s_row)
    log_sum = row_sum
    if sizes.lse:
        log_sum = gl.convert_layout(gl.sum(running.log_sum, axis=1), sizes.s_row)
    return acc, row_sum, log_sum
