"""Warp-specialized block-sparse attention in Gluon, for Hopper; docs/OPS.md states tensors and rounding.

Work items, masks and formats are those of `kernels/attention.py`; the division of labour is not. One warp loads: it
fills rings of k and v tiles, and the next item's queries, through TMA. Two warp groups compute over the same tiles,
each 64 queries of an item, and take turns at the tensor cores. Within a group the softmax of a block overlaps with PV
of the block before it, as in FlashAttention-3 (arXiv 2407.08608, section 3.2), or in e4m3 with QK of the next one.

`hopper_bounded` has the steps of bf16 and of int8 q and k, `hopper_e4m3` those of e4m3. docs/kernels/attention.md says
who waits for whom, counts bytes and instructions, and has predictions and measurements.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from happyhorse_fast.kernels import numerics
from happyhorse_fast.kernels.attention import LOG_2, P_EXPONENT
from happyhorse_fast.kernels.hopper_barriers import pass_turn
from happyhorse_fast.kernels.hopper_bounded import attend_bounded
from happyhorse_fast.kernels.hopper_e4m3 import attend_e4m3
from happyhorse_fast.kernels.hopper_ring import Rings, await_full, fill, make_barriers, make_ring, release
from happyhorse_fast.kernels.hopper_scores import Item, Scales, Work
from happyhorse_fast.kernels.hopper_sizes import GROUPS, sizes_of

to_e4m3 = gluon.jit(numerics.to_e4m3.fn)

Q_SLOTS = gl.constexpr(2)
"""Slots of the ring of queries: the next item's arrive while this item is computed."""
COMPUTE_REGISTERS = gl.constexpr(240)
LOAD_REGISTERS = gl.constexpr(24)
"""Registers per thread. The loading warp counts as a group of 128: 2 x 128 x 240 + 128 x 24 of an SM's 65,536."""


@gluon.jit
def work_item(work, item, sizes: gl.constexpr):
    """Return (entry, head, row) of an item: one row of a map, one query head. Heads of a row are consecutive items."""
    entry = gl.load(work.order + item // sizes.shared)
    return entry, entry // work.map_rows * sizes.shared + item % sizes.shared, entry % work.map_rows


@gluon.jit
def load_tiles(q, k, v, rings, work, sizes: gl.constexpr):
    """Load, in the loading warp, queries of every item, and k and v of its listed blocks, in the order of their use.

    In e4m3 k of the next block comes before v of this one: a step begins with its QK.
    """
    turn = 0
    use = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        entry, head, row = work_item(work, item, sizes)
        fill(rings.q, turn, q, row * sizes.block, head * sizes.d, GROUPS, Q_SLOTS)
        start = gl.load(work.starts + entry)
        steps = gl.load(work.counts + entry * 2 + 1)
        channel = head // sizes.group * sizes.d
        key = 0
        for at in range(start, start + steps):
            after = gl.load(work.columns + at) * sizes.block
            fill(rings.k, use, k, after, channel, 1, sizes.stages)
            if sizes.e4m3:
                if at > start:
                    fill_v(rings, use - 1, v, key, channel, sizes)
                key = after
            else:
                fill_v(rings, use, v, after, channel, sizes)
            use += 1
        if sizes.e4m3 and steps > 0:
            fill_v(rings, use - 1, v, key, channel, sizes)
        turn += 1


@gluon.jit
def fill_v(rings, use, v, key, channel, sizes: gl.constexpr):
    """Load v of the block that begins at a key, which is transposed in e4m3."""
    if sizes.e4m3:
        fill(rings.v, use, v, channel, key, 1, sizes.stages, 1)
    else:
        fill(rings.v, use, v, key, channel, 1, sizes.stages, 1)


@gluon.jit
def compute(GROUP: gl.constexpr, common, sizes: gl.constexpr):
    """Compute, as one of the two groups, the queries from GROUP * 64 on of every item's block."""
    rings, work, scales, out, out_scale, lse, gate, queries, key_blocks = common
    ROWS: gl.constexpr = sizes.rows
    FIRST: gl.constexpr = GROUP * ROWS
    if GROUP == 1:
        pass_turn(GROUP)
    turn = 0
    use = 0
    for number in range(gl.program_id(0), work.items, gl.num_programs(0)):
        entry, head, row = work_item(work, number, sizes)
        kv_head = head // sizes.group
        query = row * sizes.block + FIRST + gl.arange(0, ROWS, layout=sizes.s_row)
        live = query < queries
        scores = scales.scores
        of_k = scales.k
        of_v = scales.v
        if sizes.int8:
            scores *= gl.load(scales.q + query.to(gl.int64) * sizes.heads_q + head, mask=live, other=1.0)
            of_k += kv_head * key_blocks
        elif sizes.e4m3:
            scores *= gl.load(scales.q + row)
        if sizes.e4m3:
            of_v += kv_head * key_blocks
        of_item = Scales(scores, scales.q, of_k, of_v)
        slot = await_full(rings.q, turn, Q_SLOTS)
        q_tile = rings.q.tiles.index(slot * GROUPS + GROUP)
        n_full = gl.load(work.counts + entry * 2)
        n_all = gl.load(work.counts + entry * 2 + 1)
        item = Item(q_tile, gl.load(work.starts + entry), n_full, n_all)
        acc = gl.full([ROWS, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
        row_sum = gl.full([ROWS], 0.0, gl.float32, layout=sizes.s_row)
        log_sum = row_sum
        row_max = gl.full([ROWS], -float("inf"), gl.float32, layout=sizes.s_row)
        if n_all > 0:
            if sizes.e4m3:
                acc, row_sum, row_max = attend_e4m3(item, use, rings, work, of_item, GROUP, sizes)
            else:
                acc, row_sum, log_sum = attend_bounded(item, use, rings, work, of_item, GROUP, sizes)
            use += n_all
        release(rings.q, slot)
        turn += 1

        row_sum = gl.where(row_sum == 0, 1.0, row_sum)  # a row without a key gives 0 / 1; NaN stays
        factor = 1.0 / row_sum
        if gate is not None:
            factor *= gl.load(gate + query.to(gl.int64) * sizes.heads_q + head, mask=live, other=0.0)
        if out_scale is not None:
            factor *= 1.0 / gl.load(out_scale)
        result = acc * gl.convert_layout(factor, sizes.o_row)[:, None]
        store_result(result, out, out_scale, row * sizes.block + FIRST, head, queries, sizes)
        if lse is not None:  # a row without a key gives -inf + log2(1), or log2(0)
            if sizes.e4m3:
                log_sum = row_max + gl.log2(row_sum) - P_EXPONENT
            else:
                log_sum = gl.log2(log_sum)
            gl.store(lse + head.to(gl.int64) * queries + query, log_sum * LOG_2, mask=live)


@gluon.jit
def store_result(result, out, out_scale, first, head, queries, sizes: gl.constexpr):
    """Round the result, to e4m3 with an ``out_scale``, else to bf16, and store it 16 bytes a thread at a time."""
    D: gl.constexpr = sizes.d
    EACH: gl.constexpr = 8 if out_scale is None else 16
    layout: gl.constexpr = gl.BlockedLayout([1, EACH], [32 * EACH // D, D // EACH], [4, 1], [1, 0])
    if out_scale is None:
        value = result.to(gl.bfloat16)
    else:
        value = to_e4m3(result)
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
    flag,
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
    """Compute every work item of a launch.

    q, k and v are TMA descriptors. ``scale`` is the softmax scale times log2(e).

    With a ``flag`` of 0 the kernel has no items: the scores have no bound, and the plain kernel, launched beside it,
    computes them. q_scale and k_scale come with q and k of 8 bits, v_scale with e4m3 v. out_scale asks for e4m3 output.
    lse and gate are None where they are not wanted.
    """
    sizes: gl.constexpr = sizes_of(
        HEADS_Q,
        HEADS_KV,
        MAP_HEADS,
        D,
        BLOCK,
        STAGES,
        q.dtype.primitive_bitwidth,
        v.dtype.primitive_bitwidth,
        q.dtype.is_int(),
        lse is not None,
    )
    if flag is not None:
        items = gl.where(gl.load(flag) != 0, items, 0)
    q_ring = make_ring(q, make_barriers(Q_SLOTS, GROUPS), GROUPS, Q_SLOTS)
    steps = make_barriers(STAGES, GROUPS)
    rings = Rings(q_ring, make_ring(k, steps, 1, STAGES), make_ring(v, steps, 1, STAGES), make_barriers(1, 1))
    fence_async_shared()
    work = Work(counts, starts, columns, mask_ids, mask_bits, order, map_rows, items)
    scales = Scales(scale, q_scale, k_scale, v_scale)
    common = (rings, work, scales, out, out_scale, lse, gate, queries, key_blocks)
    gl.warp_specialize(
        [
            (compute, (0, common, sizes)),
            (compute, (1, common, sizes)),
            (load_tiles, (q, k, v, rings, work, sizes)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )
