"""A dynamic block map in three launches: pool q and k per block, choose the blocks of every row, order the rows.

One program chooses the blocks of one key/value head and block of queries, with the whole row of scores in registers (at
most 2048 blocks of keys; 15 s at 1080p have 1,464). Scores are ranked as integers of the same order, and the threshold
is found bit by bit: 32 counts, no sort. Of equal scores the lowest block is chosen.

Predicted per layer at 1080p on an H100: 5 s (502 blocks) take 2.6 GFLOP and 1.0 GB from L2 (the pooled keys of a head,
once per row), 0.2 ms; 15 s take 22 GFLOP and 8.8 GB, 1.6 ms. That is half a percent of attention over 25 % of the
blocks.
"""

import triton
import triton.language as tl

FULL = tl.constexpr(-1)
"""Entry of a selector's table for a block without a mask."""
ABSENT = tl.constexpr(-2)
"""Entry of a selector's table for a block that the exact map leaves out."""
BEST_WEIGHT = tl.constexpr(float(2**30))
"""Softmax weight of a row's best block. Weights are integers, so that their sum does not depend on its order."""
MASS_STEPS = tl.constexpr(2**20)
"""Steps of ``mass`` in 1: ``mass`` is an integer number of 2^-20."""


@triton.jit
def block_sum(
    source,
    scale,
    live,
    block,
    head,
    stride_row,
    stride_head,
    stride_channel,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum a head's live rows of a block, [D] float32. Other rows, also those past the last, are not read.

    ``scale`` [tokens, HEADS] multiplies a row's codes; None for none.
    """
    start = source + block.to(tl.int64) * BLOCK * stride_row + head.to(tl.int64) * stride_head
    channel = tl.arange(0, D)
    total = tl.zeros([ROWS, D], dtype=tl.float32)
    for first in tl.static_range(0, BLOCK, ROWS):
        row = first + tl.arange(0, ROWS)
        alive = tl.load(live + block * BLOCK + row) != 0
        place = start + row[:, None].to(tl.int64) * stride_row + channel[None, :].to(tl.int64) * stride_channel
        values = tl.load(place, mask=alive[:, None], other=0.0).to(tl.float32)
        if scale is not None:
            token = block.to(tl.int64) * BLOCK + row
            values *= tl.load(scale + token * HEADS + head, mask=alive, other=0.0)[:, None]
        total += values
    return tl.sum(total, axis=0)


@triton.jit
def pool_blocks_kernel(
    q,
    k,
    q_scale,
    k_scale,
    live,
    pooled_q,
    pooled_k,
    blocks,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kn,
    stride_kh,
    stride_kd,
    HEADS_Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write ``pooled_q`` [Hq, R, D], and ``pooled_k`` [Hkv, D, S], which the choice reads along S.

    The grid is (blocks, Hq + Hkv). q_scale [N, Hq] and k_scale [Hkv, S] come with int8, whose values are summed. They
    are None in bf16, and in e4m3, whose codes are summed.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, D)
    if head < HEADS_Q:
        total = block_sum(q, q_scale, live, block, head, stride_qn, stride_qh, stride_qd, HEADS_Q, D, BLOCK, ROWS)
        tl.store(pooled_q + (head * blocks + block) * D + channel, total)
    else:
        kv_head = head - HEADS_Q
        total = block_sum(k, None, live, block, kv_head, stride_kn, stride_kh, stride_kd, 1, D, BLOCK, ROWS)
        if k_scale is not None:
            total *= tl.load(k_scale + kv_head * blocks + block)
        tl.store(pooled_k + (kv_head * D + channel) * blocks + block, total)


@triton.jit
def row_products(
    pooled_q,
    pooled_k,
    kv_head,
    row,
    blocks,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Multiply a row's pooled queries by every pooled key, [BLOCKS] float32: the group's sum (MEAN) or its maximum."""
    column, member = tl.arange(0, BLOCKS), tl.arange(0, PADDED_GROUP)
    query = pooled_q + ((kv_head * GROUP + member) * blocks + row) * D
    key = pooled_k + kv_head * D * blocks + column
    if MEAN:
        result = tl.zeros([BLOCKS], dtype=tl.float32)
        for d in tl.range(0, D, loop_unroll_factor=4):
            of_group = tl.sum(tl.load(query + d, mask=member < GROUP, other=0.0), axis=0)
            result += of_group * tl.load(key + d * blocks, mask=column < blocks, other=0.0)
    else:
        products = tl.zeros([PADDED_GROUP, BLOCKS], dtype=tl.float32)
        for d in tl.range(0, D, loop_unroll_factor=4):
            of_group = tl.load(query + d, mask=member < GROUP, other=0.0)
            products += of_group[:, None] * tl.load(key + d * blocks, mask=column < blocks, other=0.0)[None, :]
        result = tl.max(tl.where((member < GROUP)[:, None], products, -float("inf")), axis=0)
    return result


@triton.jit
def rank_key(score):
    """Map a float32 other than NaN to a uint32 above 0 of the same order; -0.0 counts as 0.0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ -1, bits | -(2**31))
    return ordered.to(tl.uint32, bitcast=True)


@triton.jit
def select_blocks_kernel(
    pooled_q,
    pooled_k,
    table,
    prefix,
    inverse,
    q_scale,
    k_scale,
    counts,
    starts,
    columns,
    mask_ids,
    keep,
    mass,
    scale,
    blocks,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    MEAN: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """Choose one row of the map, and write each of its S places in ``columns`` and ``mask_ids`` once.

    The grid is (Hkv * R,). BY_MASS chooses by ``mass``, in steps of 2^-20, else ``keep`` blocks are chosen. q_scale and
    k_scale are the scales per block of e4m3 codes, None in the other formats.
    """
    entry = tl.program_id(0)
    kv_head, row = entry // blocks, entry % blocks
    column = tl.arange(0, BLOCKS)
    inside = column < blocks
    products = row_products(pooled_q, pooled_k, kv_head, row, blocks, GROUP, PADDED_GROUP, D, BLOCKS, MEAN)
    factor_q = tl.load(inverse + row)
    factor_k = tl.load(inverse + column, mask=inside, other=0.0)
    if q_scale is not None:
        factor_q *= tl.load(q_scale + row)
        factor_k *= tl.load(k_scale + column, mask=inside, other=0.0)
    score = products * (factor_q * scale * factor_k)

    kind = tl.load(table + row * blocks + column, mask=inside, other=ABSENT)
    always = (tl.load(prefix + row) | tl.load(prefix + column, mask=inside, other=0)) != 0
    available = kind != ABSENT
    candidate = available & (always == 0)
    rank = tl.where(candidate, rank_key(score), 0)
    if BY_MASS:
        best = tl.max(tl.where(candidate, score, -float("inf")), axis=0)
        share = tl.exp(tl.where(candidate, score - best, -float("inf")))
        # Every weight is at least 1, so that a mass of 1 keeps every candidate.
        weight = tl.where(candidate, tl.maximum((share * BEST_WEIGHT).to(tl.int64), 1), 0)
        need = (tl.sum(weight, axis=0) * mass + (MASS_STEPS - 1)) // MASS_STEPS
    else:
        weight = candidate.to(tl.int32)
        need = keep

    # The largest rank whose candidates, with those above it, reach ``need``; 0, which no candidate has, if none does.
    threshold = tl.full((), 0, tl.uint32)
    for step in tl.range(0, 32):
        trial = threshold | (tl.full((), 1 << 31, tl.uint32) >> step)
        reached = tl.sum(tl.where(rank >= trial, weight, 0), axis=0)
        threshold = tl.where(reached >= need, trial, threshold)
    above = rank > threshold
    tied = tl.where(candidate & (rank == threshold), weight, 0)
    before = tl.sum(tl.where(above, weight, 0), axis=0) + tl.cumsum(tied, axis=0) - tied
    kept = (candidate & (above | ((rank == threshold) & (before < need)))) | (available & always)

    full = (kept & (kind == FULL)).to(tl.int32)
    partial = (kept & (kind != FULL)).to(tl.int32)
    n_full, n_partial = tl.sum(full, axis=0), tl.sum(partial, axis=0)
    full_before, partial_before = tl.cumsum(full, axis=0) - full, tl.cumsum(partial, axis=0) - partial
    left_out = n_full + n_partial + column - full_before - partial_before
    place = tl.where(full != 0, full_before, tl.where(partial != 0, n_full + partial_before, left_out))
    start = entry * blocks
    tl.store(columns + start + place, column, mask=inside)
    tl.store(mask_ids + start + place, tl.where(kept, kind, FULL), mask=inside)
    tl.store(counts + entry * 2, n_full)
    tl.store(counts + entry * 2 + 1, n_full + n_partial)
    tl.store(starts + entry, start)


@triton.jit
def order_rows_kernel(counts, order, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write ``order`` [rows], longest row first: a row's place is the number of rows that come before it.

    The grid is (rows / BLOCK_M,). 11,712 rows (15 s at 1080p, 8 heads) take 137 million comparisons, predicted 25 us; a
    sort would take several launches.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    length = tl.load(counts + row * 2 + 1, mask=row < rows, other=0)
    before = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for first in tl.range(0, rows, BLOCK_N):
        other = first + tl.arange(0, BLOCK_N)
        others = tl.load(counts + other * 2 + 1, mask=other < rows, other=-1)
        longer = others[None, :] > length[:, None]
        earlier = (others[None, :] == length[:, None]) & (other[None, :] < row[:, None])
        before += (longer | earlier).to(tl.int32)
    tl.store(order + tl.sum(before, axis=1), row, mask=row < rows)
