"""Attention of one item with a bounded softmax, for bf16 and for int8 q and k: a part of the Hopper kernel.

A bound on the scores keeps exp2(score) in float32's range (`ops.attention.score_bound`), so p = exp2(s * scale) needs
no maximum to find, to share between threads or to correct for. Each of the four threads of a row keeps its own row sum
until the item ends. P is summed after it is rounded to bf16: its largest value in a row is not 1, and a row of one key
must give exactly that key's v.

P is packed to bf16 twice: before the end of PV to round it, and after it, exactly, as the operand of the next PV. Work
after the end of PV delays the next products: with the sums there a tile took 2740 cycles of an SM of an H200, and 2400
with sums of P as it is before rounding, made earlier. Packing once, before the end of PV, is slower still, 4320 cycles:
the packed words are then the registers that PV still reads, and ptxas waits for every single product. So is a sum of
the packed words in the next step, while QK runs and a group only waits: 2900 to 4200.

The two groups take turns at issuing products. The QK and PV of one run while the other computes exponents. Without
turns both come to need the tensor cores at the same time (docs/kernels/attention.md).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from happyhorse_fast.kernels.hopper_barriers import await_turn, pass_turn
from happyhorse_fast.kernels.hopper_ring import await_full, hold_order, release
from happyhorse_fast.kernels.hopper_scores import hide, start_qk


class Running(NamedTuple):
    """State between two steps. PV of ``p`` is not issued yet; ``p`` is packed, two bf16 to a 32-bit word.

    ``k_scale`` is of the next block, ``column`` is the block after it.
    """

    acc: Any
    p: Any
    row_sum: Any
    log_sum: Any
    k_scale: Any
    column: Any


@gluon.jit
def packed(even, odd):
    """Pack two columns of P as bf16 into a 32-bit word: ptxas would carry 64 values of 16 bits in 64 registers."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], gl.int32, True, 1)


@gluon.jit
def rounded(p, sizes: gl.constexpr):
    """Round P to bf16, kept in float32: (even columns, odd columns). A bf16 is the upper half of its float32."""
    even, odd = gl.split(gl.reshape(p, (sizes.rows, sizes.block // 2, 2)))
    words = packed(even, odd)
    return (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def operand(words, sizes: gl.constexpr):
    """Return packed P as PV's left operand. Both columns of a word pass it to the assembly, which uses one."""
    both = gl.reshape(gl.join(words, words), (sizes.rows, sizes.block))
    halves = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r", [gl.convert_layout(both, sizes.p_layout)], gl.int16, True, 2
    )
    return halves.to(gl.bfloat16, bitcast=True)


@gluon.jit
def sums(even, odd, sizes: gl.constexpr):
    """Return each thread's sum over its own columns, [rows, 4]."""
    return gl.sum(gl.reshape(even + odd, (sizes.rows, sizes.block // 8, 4)), axis=1)


@gluon.jit
def sums_unrounded(p, sizes: gl.constexpr):
    """Return each thread's sum of P before rounding, [rows, 4], for an LSE."""
    even, odd = gl.split(gl.reshape(p, (sizes.rows, sizes.block // 2, 2)))
    return sums(even, odd, sizes)


@gluon.jit
def scaled(s, scales, k_scale, sizes: gl.constexpr):
    """Return the scores as exponents of 2. Masks come after this: a scale may round to 0, and -inf * 0 is NaN."""
    if sizes.int8:
        t = s.to(gl.float32) * (scales.scores * k_scale)[:, None]
    else:
        t = s * scales.scores
    return t


@gluon.jit
def scale_of(k_scales, column, sizes: gl.constexpr):
    """Return k's scale of a block, 1 in bf16, which has none."""
    scale = 1.0
    if sizes.int8:
        scale = gl.load(k_scales + column)
    return scale


@gluon.jit
def column_of(work, at, sizes: gl.constexpr):
    """Return the column of a listed block in int8, whose scale is read by it; 0 in bf16."""
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
    """Run one step: QK and softmax of block ``at``, PV of the block before it. ``last`` is the last listed block.

    Without :func:`hold_order` ptxas (CUDA 12.8) moves the exponents behind the end of PV, where none of this group's
    products overlap with them.
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
    hold_order(rings)
    acc = warpgroup_mma_wait(0, deps=[pv_pending])
    release(rings.k, stage)
    return Running(acc, packed(even, odd), row_sum, log_sum, next_scale, next_column)


@gluon.jit
def attend_bounded(item, use, rings, work, scales, GROUP: gl.constexpr, sizes: gl.constexpr):
    """Attend to all listed blocks of an item, at least one: (accumulator, sum of rounded P, sum of P for an LSE)."""
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
