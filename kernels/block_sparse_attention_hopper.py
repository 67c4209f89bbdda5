"""Block-sparse attention with warps of two kinds, in Gluon, for Hopper; docs/OPS.md states tensors and rounding.

The work items, masks and rounding points of ``block_sparse_attention``, another division of labour. One warp loads: it
fills rings of k and v tiles, and the next item's queries, through TMA. Two warp groups compute, 64 queries of an item
each. They share the tiles and nothing else: no barrier spans both, so one group's exponents run beside the other's
products. Within a group, in bf16, the softmax of a block runs beside PV of the block before it, as in FlashAttention-3
(arXiv 2407.08608, section 3.2).

Predicted per 128 x 128 x 128 tile (8.4 MFLOP) on an H100 SM, in cycles; instructions are those of the compiled loop
(Triton 3.6.0) times two groups, over four schedulers:

| | tensor cores | exponents | instructions | FlashAttention-3 takes | so |
|---|---|---|---|---|---|
| bf16 | 2048 | 1056 | 972 | 2999 | 570 to 650 TFLOP/s, bound by the products |
| e4m3 q and k | 1536 | 1056 | 974 | - | 700 to 790 |
| e4m3 | 1024 | 1056 | 1084 | 1928 | 750 to 950, bound by all three |

In e4m3 772 instructions a step were 542 once v's tokens were in fragment order (docs/OPS.md) and P crossed the loop in
float32: bringing P into the layout of an operand took 230.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from happyhorse_fast.kernels import block_sparse_attention, numerics
from happyhorse_fast.kernels.block_sparse_attention import LOG_2
from happyhorse_fast.kernels.hopper_ring import await_full, fill, make_ring, release
from happyhorse_fast.kernels.hopper_sizes import GROUPS, sizes_of

in_fragment_order = gluon.jit(block_sparse_attention.in_fragment_order.fn)
scale_of = gluon.jit(numerics.scale_of.fn)
to_e4m3 = gluon.jit(numerics.to_e4m3.fn)

Q_SLOTS = gl.constexpr(2)
"""Items whose queries fit at once: the next one's arrive while this one is computed."""
COMPUTE_REGISTERS = gl.constexpr(240)
LOAD_REGISTERS = gl.constexpr(24)
"""Per thread: 2 x 128 x 240 + 128 x 24 of 65,536."""


class Work(NamedTuple):
    """What there is to do: the block map's tensors, the rows of a map and the number of items."""

    counts: Any
    starts: Any
    columns: Any
    mask_ids: Any
    mask_bits: Any
    order: Any
    map_rows: Any
    items: Any


class Scales(NamedTuple):
    """Of QK, and of q's row, k's blocks and v's blocks where those are e4m3."""

    softmax: Any
    q: Any
    k: Any
    v: Any


class Running(NamedTuple):
    """The online softmax between two steps; ``alpha`` belongs to ``p``, whose PV is yet to come.

    bf16 P is kept as PV's operand. e4m3 P is kept in float32, in the registers that S will take: as 64 codes of 8 bits
    it would cost a thread 200 instructions a step to pack and unpack.
    """

    acc: Any
    p: Any
    alpha: Any
    row_sum: Any
    row_max: Any


@gluon.jit
def work_item(work, item, sizes: gl.constexpr):
    """(entry, head, row) of an item: a row of a map and one query head, the heads of a row side by side."""
    entry = gl.load(work.order + item // sizes.shared)
    return entry, entry // work.map_rows * sizes.shared + item % sizes.shared, entry % work.map_rows


@gluon.jit
def load_tiles(q, k, v, q_ring, k_ring, v_ring, work, sizes: gl.constexpr):
    """The loading warp: queries of every item, k and v of every listed block, in the order they are used."""
    turn = 0
    use = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        entry, head, row = work_item(work, item, sizes)
        fill(q_ring, turn, q, row * sizes.block, head * sizes.d, GROUPS, Q_SLOTS)
        start = gl.load(work.starts + entry)
        steps = gl.load(work.counts + entry * 2 + 1)
        channel = head // sizes.group * sizes.d
        for at in range(start, start + steps):
            key = gl.load(work.columns + at) * sizes.block
            fill(k_ring, use, k, key, channel, 1, sizes.stages)
            if sizes.pv_fp8:
                fill(v_ring, use, v, channel, key, 1, sizes.stages)
            else:
                fill(v_ring, use, v, key, channel, 1, sizes.stages)
            use += 1
        turn += 1


@gluon.jit
def hide(s, work, at, first, sizes: gl.constexpr):
    """-inf where a partial block's bits are 0; ``first`` is the group's first query in the block.

    Which word a column is in is known when this is compiled: a thread loads 8 words and exchanges none.
    """
    WORDS: gl.constexpr = sizes.block // 32
    row = gl.arange(0, sizes.rows, layout=sizes.s_row)
    column = gl.arange(0, sizes.block, layout=gl.SliceLayout(0, sizes.s_layout))
    words = work.mask_bits + gl.load(work.mask_ids + at).to(gl.int64) * (sizes.block * WORDS) + (first + row) * WORDS
    bits = gl.full([sizes.rows, sizes.block], 0, gl.int32, layout=sizes.s_layout)
    for word in gl.static_range(WORDS):
        bits = gl.where((column // 32 == word)[None, :], gl.load(words + word)[:, None], bits)
    return gl.where(((bits >> (column % 32)[None, :]) & 1) != 0, s, -float("inf"))


@gluon.jit
def softmax(s, row_sum, row_max, scale, BIAS: gl.constexpr, MASKED: gl.constexpr):
    """One step of the online softmax, in powers of two: (p, alpha, row_sum, row_max)."""
    new_max = gl.maximum(row_max, gl.max(s, axis=1) * scale)
    shift = new_max
    if MASKED:  # a row that has seen no key: -inf - -inf would be NaN
        shift = gl.where(new_max == -float("inf"), 0.0, new_max)
    alpha = gl.exp2(row_max - shift)
    p = gl.exp2(s * scale - (shift - BIAS)[:, None])
    return p, alpha, row_sum * alpha + gl.sum(p, axis=1), new_max


@gluon.jit
def scale_at(work, of_blocks, at, scale):
    """``scale`` times that of the listed block, where blocks have scales."""
    if of_blocks is not None:
        scale = scale * gl.load(of_blocks + gl.load(work.columns + at))
    return scale


@gluon.jit
def start_qk(q_tile, k_ring, stage, zero):
    """Issue QK."""
    return warpgroup_mma(q_tile, k_ring.tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def bf16_operand(p, sizes: gl.constexpr):
    """P as PV's operand."""
    return gl.convert_layout(p.to(gl.bfloat16), sizes.p_layout)


@gluon.jit
def e4m3_operand(p, sizes: gl.constexpr):
    """P as PV's operand, its columns in the order of v's tokens: no thread gives another any."""
    return gl.convert_layout(in_fragment_order(p.to(gl.float8e4nv)), sizes.p_layout)


@gluon.jit
def start_pv(running, v_ring, stage, zero, sizes: gl.constexpr):
    """Issue PV: e4m3 apart, because its scale is this block's own, bf16 into the accumulator."""
    if sizes.pv_fp8:
        v = v_ring.tiles.index(stage).permute((1, 0))
        pending = warpgroup_mma(e4m3_operand(running.p, sizes), v, zero, use_acc=False, is_async=True)
    else:
        pending = warpgroup_mma(running.p, v_ring.tiles.index(stage), running.acc, is_async=True)
    return pending


@gluon.jit
def add_pv(running, pv, scale, sizes: gl.constexpr):
    """The accumulator with a finished PV, which in bf16 it went into."""
    acc = pv
    if sizes.pv_fp8:
        acc = running.acc * gl.convert_layout(running.alpha, sizes.o_row)[:, None] + pv * scale
    return acc


@gluon.jit
def advance(
    running,
    use,
    at,
    q_tile,
    k_ring,
    v_ring,
    work,
    scales,
    zero_s,
    zero,
    FIRST: gl.constexpr,
    MASKED: gl.constexpr,
    sizes: gl.constexpr,
):
    """PV of the block before this one, QK and softmax of this one.

    bf16: QK, then PV, and the softmax runs beside PV. v of this block is awaited before the end of PV: a wait is a
    loop, and ptxas moves nothing across one. Without it the exponents end up behind PV (ptxas of CUDA 12.8), where
    nothing of this group runs beside them.

    e4m3: PV, then QK, and the accumulator is scaled and added to beside QK. With the softmax there as well S, PV, the
    accumulator and P are 208 registers, and 56 bytes a thread spill. As much is issued as multiplied, so the other
    group's products are enough beside the softmax. PV is not begun a step earlier: a product that is under way where a
    loop turns makes ptxas wait for each of its instructions.
    """
    before = (use - 1) % sizes.stages
    s_scale = scale_at(work, scales.k, at, scales.softmax)
    pv_scale = scale_at(work, scales.v, at - 1, 1.0)
    stage = await_full(k_ring, use, sizes.stages)
    if sizes.pv_fp8:
        pv_pending = start_pv(running, v_ring, before, zero, sizes)
        s_pending = start_qk(q_tile, k_ring, stage, zero_s)
        acc = add_pv(running, warpgroup_mma_wait(1, deps=[pv_pending]), pv_scale, sizes)
        release(v_ring, before)
        s = warpgroup_mma_wait(0, deps=[s_pending])
    else:
        s_pending = start_qk(q_tile, k_ring, stage, zero_s)
        pv_pending = start_pv(running, v_ring, before, zero, sizes)
        s = warpgroup_mma_wait(1, deps=[s_pending])
    release(k_ring, stage)
    if MASKED:
        s = hide(s, work, at, FIRST, sizes)
    p, alpha, row_sum, row_max = softmax(s, running.row_sum, running.row_max, s_scale, sizes.bias, MASKED)
    await_full(v_ring, use, sizes.stages)
    if not sizes.pv_fp8:
        acc = warpgroup_mma_wait(0, deps=[pv_pending]) * gl.convert_layout(alpha, sizes.o_row)[:, None]
        release(v_ring, before)
        p = bf16_operand(p, sizes)
    return Running(acc, p, alpha, row_sum, row_max)


@gluon.jit
def compute(WHICH: gl.constexpr, common, sizes: gl.constexpr):
    """A computing group: queries WHICH * 64 and on of every item."""
    q_ring, k_ring, v_ring, work, scales, out, out_scale, lse, gate, k_mean, queries, key_blocks = common
    D: gl.constexpr = sizes.d
    BLOCK: gl.constexpr = sizes.block
    STAGES: gl.constexpr = sizes.stages
    ROWS: gl.constexpr = sizes.rows
    FIRST: gl.constexpr = WHICH * ROWS
    zero_s = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout=sizes.s_layout)
    zero = gl.full([ROWS, D], 0.0, gl.float32, layout=sizes.o_layout)
    turn = 0
    use = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        entry, head, row = work_item(work, item, sizes)
        n_full = gl.load(work.counts + entry * 2)
        n_all = gl.load(work.counts + entry * 2 + 1)
        start = gl.load(work.starts + entry)
        scaled = scales
        if scales.q is not None:
            of_head = scales.v
            if scales.v is not None:
                of_head = scales.v + head // sizes.group * key_blocks
            scaled = Scales(scales.softmax * gl.load(scales.q + row), scales.q, scales.k, of_head)
        slot = await_full(q_ring, turn, Q_SLOTS)
        q_tile = q_ring.tiles.index(slot * GROUPS + WHICH)
        if lse is not None and k_mean is not None:
            channel = gl.arange(0, D, layout=gl.SliceLayout(0, sizes.o_layout))
            mean = gl.load(k_mean + head // sizes.group * D + channel)
            of_mean = gl.sum(q_tile.load(sizes.o_layout).to(gl.float32) * mean[None, :], axis=1) * scaled.softmax
            of_mean = gl.convert_layout(of_mean, sizes.s_row)
        acc = zero
        row_sum = gl.full([ROWS], 0.0, gl.float32, layout=sizes.s_row)
        row_max = gl.full([ROWS], -float("inf"), gl.float32, layout=sizes.s_row)
        if n_all > 0:
            s_scale = scale_at(work, scaled.k, start, scaled.softmax)
            stage = await_full(k_ring, use, STAGES)
            s = warpgroup_mma_wait(0, deps=[start_qk(q_tile, k_ring, stage, zero_s)])
            release(k_ring, stage)
            if n_full == 0:
                s = hide(s, work, start, FIRST, sizes)
            p, alpha, row_sum, row_max = softmax(s, row_sum, row_max, s_scale, sizes.bias, True)
            await_full(v_ring, use, STAGES)
            if not sizes.pv_fp8:
                p = bf16_operand(p, sizes)
            running = Running(acc, p, alpha, row_sum, row_max)
            for j in range(1, n_full):
                running = advance(
                    running, j + use, j + start, q_tile, k_ring, v_ring, work, scaled, zero_s, zero, FIRST, False, sizes
                )  # fmt: skip
            for j in range(gl.maximum(n_full, 1), n_all):
                running = advance(
                    running, j + use, j + start, q_tile, k_ring, v_ring, work, scaled, zero_s, zero, FIRST, True, sizes
                )  # fmt: skip
            use += n_all
            last = (use - 1) % STAGES
            pv = warpgroup_mma_wait(0, deps=[start_pv(running, v_ring, last, zero, sizes)])
            release(v_ring, last)
            acc = add_pv(running, pv, scale_at(work, scaled.v, start + n_all - 1, 1.0), sizes)
            row_sum = running.row_sum
            row_max = running.row_max
        release(q_ring, slot)
        turn += 1

        row_sum = gl.where(row_sum > 0, row_sum, 1.0)  # no key: 0 / 1, and an LSE of -inf + 0
        factor = 1.0 / row_sum
        query = row * BLOCK + FIRST + gl.arange(0, ROWS, layout=sizes.s_row)
        live = query < queries
        if gate is not None:
            factor *= gl.load(gate + query.to(gl.int64) * sizes.heads_q + head, mask=live, other=0.0)
        result = acc * gl.convert_layout(factor, sizes.o_row)[:, None]
        store_result(result, out, out_scale, row * BLOCK + FIRST, head, queries, sizes)
        if lse is not None:
            log_sum = row_max + gl.log2(row_sum) - sizes.bias
            if k_mean is not None:
                log_sum += of_mean
            gl.store(lse + head.to(gl.int64) * queries + query, log_sum * LOG_2, mask=live)


@gluon.jit
def store_result(result, out, out_scale, first, head, queries, sizes: gl.constexpr):
    """Quantise by row where asked for, and store 16 bytes a thread at a time."""
    D: gl.constexpr = sizes.d
    EACH: gl.constexpr = 8 if out_scale is None else 16
    layout: gl.constexpr = gl.BlockedLayout([1, EACH], [32 * EACH // D, D // EACH], [4, 1], [1, 0])
    if out_scale is None:
        value = result.to(gl.bfloat16)
    else:
        scale = scale_of(gl.max(gl.abs(result), axis=1))
        value = to_e4m3(result / scale[:, None])
        query = first + gl.arange(0, sizes.rows, layout=sizes.o_row)
        gl.store(out_scale + query.to(gl.int64) * sizes.heads_q + head, scale, mask=query < queries)
    query = first + gl.arange(0, sizes.rows, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    place = out + (query.to(gl.int64) * sizes.heads_q + head)[:, None] * D + channel[None, :]
    gl.store(place, gl.convert_layout(value, layout), mask=(query < queries)[:, None])


@gluon.jit
def block_sparse_attention_hopper_kernel(
    q,
    k,
    v,
    out,
    out_scale,
    lse,
    counts,
    starts,
    columns,
    mask_ids,
    mask_bits,
    order,
    q_scale,
    k_scale,
    v_scale,
    gate,
    k_mean,
    scale,
    queries,
    map_rows,
    key_blocks,
    items,
    HEADS_Q: gl.constexpr,
    HEADS_KV: gl.constexpr,
    MAP_HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Every work item of one launch; q, k and v are TMA descriptors, ``scale`` is the softmax scale times log2(e).

    q_scale and k_scale come with e4m3 q and k, v_scale with e4m3 v; out_scale asks for e4m3 output; lse, gate and
    k_mean are None where they are not wanted.
    """
    sizes: gl.constexpr = sizes_of(
        HEADS_Q, HEADS_KV, MAP_HEADS, D, BLOCK, STAGES, q.dtype.primitive_bitwidth, v.dtype.primitive_bitwidth
    )
    q_ring = make_ring(q, GROUPS, Q_SLOTS, GROUPS)
    k_ring = make_ring(k, 1, STAGES, GROUPS)
    v_ring = make_ring(v, 1, STAGES, GROUPS)
    fence_async_shared()
    work = Work(counts, starts, columns, mask_ids, mask_bits, order, map_rows, items)
    scales = Scales(scale, q_scale, k_scale, v_scale)
    common = (q_ring, k_ring, v_ring, work, scales, out, out_scale, lse, gate, k_mean, queries, key_blocks)
    gl.warp_specialize(
        [
            (compute, (0, common, sizes)),
            (compute, (1, common, sizes)),
            (load_tiles, (q, k, v, q_ring, k_ring, v_ring, work, sizes)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )
