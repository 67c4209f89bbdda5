"""Attention of one item with a bounded softmax, for bf16 and for int8 q and k: a part of the Hopper kernel.

A bound on the scores keeps exp2(score) in float32's range (`ops.attention.score_bound`), so p = exp2(s * scale) needs
no maximum to find, to share between threads or to correct for. Each of the four threads of a row keeps its own row sum
until the item ends. P is summed after it is rounded to bf16: its largest value in a row is not 1, and a row of one key
must give exactly that key's v.

Work after the end of PV delays the next products: with the sums there a tile took 2740 cycles of an SM of an H200, and
2400 with sums of P as it is before rounding, made earlier. So P is packed there and nothing else: it is summed one step
later, from the packed words, while QK runs and the group would only wait. Packing before the end of PV is slower, 4320
cycles: the packed words are then the registers that PV still reads, and ptxas waits for every single product.

The two groups take turns at issuing products. The QK and PV of one run while the other computes exponents. Without
turns both come to need the tensor cores at the same time (docs/kernels/attention.md).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from happyhorse_fast.kernels.hopper_barriers import await_turn, pass_turn
from happyhorse_fast.kernels.hopper_order import computed_here, zero_behind
from happyhorse_fast.kernels.hopper_ring import await_full, await_next, release
from happyhorse_fast.kernels.hopper_scores import hide, start_qk


class Running(NamedTuple):
    """State between two steps. PV of ``p`` is not issued yet; ``p`` is packed, two bf16 to a 32-bit word.

    ``row_sum`` is without ``p``, ``log_sum`` with it. ``k_scale`` is of the next block, ``column`` is the block after
    it. v of ``p``'s block and k of the next one have arrived.
    """

    acc: Any
    p: Any
    row_sum: Any
    log_sum: Any
    k_scale: Any
    column: Any


@gluon.jit
def packed(p, sizes: gl.constexpr):
    """Round P to bf16, two columns to a 32-bit word: ptxas would carry 64 values of 16 bits in 64 registers."""
    even, odd = gl.split(gl.reshape(p, (sizes.rows, sizes.block // 2, 2)))
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], gl.int32, True, 1)


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
def sums_of_packed(words, zero, sizes: gl.constexpr):
    """Return each thread's sum of packed P, [rows, 4]. A bf16 is the upper half of its float32; adding 0 is free."""
    even = ((words << 16) + zero).to(gl.float32, bitcast=True)
    odd = ((words & -65536) | zero).to(gl.float32, bitcast=True)
    return sums(even, odd, sizes)


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
def start_pv(running, v_ring, use, sizes: gl.constexpr):
    """Issue PV of the packed P, added to the accumulator, without waiting for it."""
    v = v_ring.tiles.index(use % sizes.v_slots)
    return warpgroup_mma(operand(running.p, sizes), v, running.acc, is_async=True)


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

    What the next products need is awaited before the end of PV: their tiles and the turn. The slots of the step before
    are released behind this step's products, which need not wait for that. Without the loop of :func:`await_next`
    ptxas moves the exponents behind the end of PV, where none of this group's products overlap with them.
    """
    slot = use % sizes.k_slots
    s_pending = start_qk(item.q_tile, rings.k, slot, sizes)
    pv_pending = start_pv(running, rings.v, use - 1, sizes)
    next_scale = scale_of(scales.k, running.column, sizes)
    next_column = column_of(work, gl.minimum(at + 2, last), sizes)
    row_sum = computed_here(running.row_sum + sums_of_packed(running.p, zero_behind(use), sizes))
    s = warpgroup_mma_wait(1, deps=[s_pending])
    pass_turn(GROUP)
    release(rings.k, slot)
    t = scaled(s, scales, running.k_scale, sizes)
    if MASKED:
        t = hide(t, work, at, GROUP * sizes.rows, sizes)
    p = gl.exp2(t)
    log_sum = running.log_sum
    if sizes.lse:
        log_sum += sums_unrounded(p, sizes)
    await_next(rings, use, gl.minimum(last - at, 1), sizes)
    await_turn(GROUP)
    acc = warpgroup_mma_wait(0, deps=[pv_pending])
    return Running(acc, packed(p, sizes), row_sum, log_sum, next_scale, next_column)


@gluon.jit
def attend_bounded(item, use, rings, work, scales, GROUP: gl.constexpr, sizes: gl.constexpr):
    """Attend to all listed blocks of an item, at least one: (accumulator, sum of rounded P, sum of P for an LSE)."""
    zero = gl.full([sizes.rows, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
    last = item.start + item.n_all - 1
    k_scale = scale_of(scales.k, column_of(work, item.start, sizes), sizes)
    next_scale = scale_of(scales.k, column_of(work, gl.minimum(item.start + 1, last), sizes), sizes)
    next_column = column_of(work, gl.minimum(item.start + 2, last), sizes)
    slot = await_full(rings.k, use, sizes.k_slots)
    s = warpgroup_mma_wait(0, deps=[start_qk(item.q_tile, rings.k, slot, sizes)])
    release(rings.k, slot)
    t = scaled(s, scales, k_scale, sizes)
    if item.n_full == 0:
        t = hide(t, work, item.start, GROUP * sizes.rows, sizes)
    p = gl.exp2(t)
    log_sum = sums_unrounded(p, sizes)
    await_next(rings, use, gl.minimum(item.n_all - 1, 1), sizes)
    await_turn(GROUP)
    row_sum = gl.zeros_like(log_sum)
    running = Running(zero, packed(p, sizes), row_sum, log_sum, next_scale, next_column)
    for j in range(1, item.n_full):
        running = advance(running, j + use, j + item.start, last, item, rings, work, scales, GROUP, False, sizes)
    for j in range(gl.maximum(item.n_full, 1), item.n_all):
        running = advance(running, j + use, j + item.start, last, item, rings, work, scales, GROUP, True, sizes)
    release(rings.q, 0)
    pv_pending = start_pv(running, rings.v, use + item.n_all - 1, sizes)
    pass_turn(GROUP)
    row_sum = gl.sum(running.row_sum + sums_of_packed(running.p, 0, sizes), axis=1)
    acc = warpgroup_mma_wait(0, deps=[pv_pending])
    row_sum = gl.convert_layout(row_sum, sizes.s_row)
    log_sum = row_sum
    if sizes.lse:
        log_sum = gl.convert_layout(gl.sum(running.log_sum, axis=1), sizes.s_row)
    return acc, row_sum, log_sum
