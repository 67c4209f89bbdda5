"""Block-sparse attention, one softmax over a block map; docs/OPS.md states tensors and rounding.

The softmax has two forms. With a running maximum it is FlashAttention's. Where the scores are known to be bounded
(`ops.attention.score_bound`) there is no maximum to find, to exchange between threads, or to correct for.

A work item is one row of the map (128 queries, or half of them) and one query head. The grid is persistent; rows come
longest first, and the heads of a group side by side, so that they read k and v from L2.

Predicted per 128 x 128 x 128 tile: 8.4 MFLOP; 64 KiB of k and v in bf16, 32 in fp8 (128 and 256 FLOP per byte from L2,
five times that from memory with five heads a group); on an H100 SM 2048 cycles of tensor cores in bf16, 1024 in fp8,
beside 1024 of exponents, which two warp groups hide behind each other's products in bf16 and cannot in fp8.
"""

import triton
import triton.language as tl

from happyhorse_fast.kernels.numerics import to_e4m3

P_EXPONENT = tl.constexpr(8.0)
"""P is multiplied by 2^8 before it becomes e4m3: at most 256, so no clamp, and kept down to 2^-17."""
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    source,
    first,
    end,
    head,
    stride_row,
    stride_head,
    stride_channel,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[ROWS, D] of a head from row ``first``; with MASKED rows from ``end`` on are 0 and not read.

    Offsets are int64: strides of a packed or transposed tensor pass 2^31 with the row at 1080p and 10 s.
    """
    if DESCRIPTORS:
        tile = source.load([first, head * D])
    else:
        start = source + first.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
        row, channel = tl.arange(0, ROWS), tl.arange(0, D)
        place = start + row[:, None].to(tl.int64) * stride_row + channel[None, :].to(tl.int64) * stride_channel
        if MASKED:
            tile = tl.load(place, mask=(row < end - first)[:, None], other=0.0)
        else:
            tile = tl.load(place)
    return tile


@triton.jit
def load_columns(
    source,
    first,
    head,
    stride_head,
    stride_channel,
    stride_column,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[D, COLUMNS] of a head of the transposed v, which is stored up to a whole block."""
    if DESCRIPTORS:
        tile = source.load([head * D, first])
    else:
        start = source + head.to(tl.int64) * stride_head + first.to(tl.int64) * stride_column
        channel, column = tl.arange(0, D), tl.arange(0, COLUMNS)
        place = channel[:, None].to(tl.int64) * stride_channel + column[None, :].to(tl.int64) * stride_column
        tile = tl.load(start + place)
    return tile


@triton.jit
def in_fragment_order(p):
    """Columns of P in the order of v's tokens (docs/OPS.md): on sm_89, 90 and 120 no thread gives another any."""
    ROWS: tl.constexpr = p.shape[0]
    COLUMNS: tl.constexpr = p.shape[1]
    split = tl.reshape(p, (ROWS, COLUMNS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(split, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))


@triton.jit
def rounded(p):
    """P in bf16, and the same values in float32.

    In PTX, for two at a time: what is both multiplied and added up ptxas would convert one by one, in the unit that
    computes the exponents.
    """
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
        "=r,=r,=r,f,f",
        [p],
        dtype=(tl.bfloat16, tl.float32),
        is_pure=True,
        pack=2,
    )


@triton.jit
def scores(q, k, BIASED: tl.constexpr):
    """q.k in float32. int8 codes: their int32 sums are at most 127 * 127 * 128, which float32 holds exactly.

    BIASED, a sum begins as the bits of 1.5 * 2^23 and so ends as those of 1.5 * 2^23 plus it: a subtraction in place of
    sm_80's only conversion, which has a quarter of its rate, in the unit of the exponents.
    """
    if BIASED:
        start = tl.full([q.shape[0], k.shape[0]], 0x4B400000, dtype=tl.int32)
        s = tl.dot(q, tl.trans(k), start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - 12582912.0
    else:
        s = tl.dot(q, tl.trans(k)).to(tl.float32)
    return s


@triton.jit
def over_rows(scale):
    """One number as it is, one a row as a column."""
    if len(scale.shape) == 1:
        scale = scale[:, None]
    return scale


@triton.jit
def attend(
    q,
    k,
    v,
    acc,
    row_sum,
    row_max,
    scale,
    v_scale,
    visible,
    MASKED: tl.constexpr,
    PV_FP8: tl.constexpr,
    BIASED: tl.constexpr,
):
    """One step with a running maximum, in powers of two: (acc, row_sum, row_max) after the keys in ``k``.

    Args of note: ``scale`` > 0 includes log2(e) and the scales of q and k, one number or one a row; ``v_scale`` belongs
    to this step's v alone, so its product is not accumulated in the tensor core but added to ``acc`` in float32.
    """
    s = scores(q, k, BIASED)
    if MASKED:  # behind the scale, which may be so small that it is 0: -inf * 0 would be NaN
        s = tl.where(visible, s * over_rows(scale), -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
    else:
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * scale)
        s = s * over_rows(scale)
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # no key yet: -inf - -inf would be NaN
    alpha = tl.exp2(row_max - shift)
    if PV_FP8:
        p = tl.exp2(s - (shift - P_EXPONENT)[:, None])
        acc = acc * alpha[:, None] + tl.dot(in_fragment_order(p.to(tl.float8e4nv)), tl.trans(v)) * v_scale
    else:
        p = tl.exp2(s - shift[:, None])
        acc = tl.dot(p.to(tl.bfloat16), v, acc * alpha[:, None])
    return acc, row_sum * alpha + tl.sum(p, axis=1), new_max


@triton.jit
def attend_bounded(
    q,
    k,
    v,
    acc,
    row_sum,
    log_sum,
    scale,
    visible,
    MASKED: tl.constexpr,
    LSE: tl.constexpr,
    BIASED: tl.constexpr,
):
    """One step without a maximum, in powers of two: (acc, row_sum, log_sum) after the keys in ``k``.

    ``row_sum`` is of P as it is multiplied, rounded to bf16; ``log_sum`` of P before that, where an LSE is wanted.
    """
    s = scores(q, k, BIASED) * over_rows(scale)
    if MASKED:
        s = tl.where(visible, s, -float("inf"))
    p = tl.exp2(s)
    in_bf16, multiplied = rounded(p)
    acc = tl.dot(in_bf16, v, acc)
    if LSE:
        log_sum += tl.sum(p, axis=1)
    return acc, row_sum + tl.sum(multiplied, axis=1), log_sum


@triton.jit
def block_sparse_attention_kernel(
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
    keys,
    map_rows,
    key_blocks,
    items,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vd,
    HEADS_Q: tl.constexpr,
    HEADS_KV: tl.constexpr,
    MAP_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PV_FP8: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BOUNDED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Every work item of one launch: BLOCK is the map's, 128. ``scale`` is the softmax scale times log2(e).

    Strides of v are of (key, head, channel), in either layout.
    q_scale and k_scale come with int8 (per token and head; per head and block) and e4m3 q and k (per block), v_scale
    with e4m3 v; out_scale asks for e4m3 output; lse and gate are None where they are not wanted. Where ``flag``
    is given, the form of the softmax that it does not name has nothing to do. BIASED: see :func:`scores`. Rows of
    ``columns`` list full blocks first: the first loop has no mask.
    """
    HALVES: tl.constexpr = BLOCK // BLOCK_M
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    BY_HEAD: tl.constexpr = q.dtype.element_ty == tl.int8  # and by row of q: scales of int8
    WORDS: tl.constexpr = BLOCK // 32  # int32 words that hold one query's keys of a partial block
    SHARED: tl.constexpr = HEADS_Q // MAP_HEADS  # query heads that walk the same row of the map
    GROUP: tl.constexpr = HEADS_Q // HEADS_KV
    if flag is not None:
        if (tl.load(flag) != 0) != BOUNDED:
            return
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        entry = tl.load(order + item // (HALVES * SHARED))
        head = entry // map_rows * SHARED + item // HALVES % SHARED
        kv_head = head // GROUP
        block_row = entry % map_rows
        half = item % HALVES * BLOCK_M
        first_query = block_row * BLOCK + half
        n_full = tl.load(counts + entry * 2)
        n_all = tl.load(counts + entry * 2 + 1)
        start = tl.load(starts + entry)

        query = first_query + tl.arange(0, BLOCK_M)
        channel = tl.arange(0, D)
        live = query < queries
        q_tile = load_rows(q, first_query, queries, head, stride_qn, stride_qh, stride_qd, D, BLOCK_M, True, False)
        row_scale = scale
        k_scales = k_scale
        if BY_HEAD:
            row_scale = scale * tl.load(q_scale + query.to(tl.int64) * HEADS_Q + head, mask=live, other=1.0)
            k_scales += kv_head * key_blocks
        elif q_scale is not None:
            row_scale = scale * tl.load(q_scale + block_row)
        acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        if BOUNDED:
            other = tl.zeros([BLOCK_M], dtype=tl.float32)
        else:
            other = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)

        ahead = tl.load(columns + start, mask=n_full > 0, other=0)
        for step in tl.range(0, n_full * STEPS):
            column = ahead  # read one step ahead: the loads of k and v never wait for their address
            ahead = tl.load(columns + start + (step + 1) // STEPS, mask=step + 1 < n_full * STEPS, other=0)
            key = column * BLOCK + step % STEPS * BLOCK_N
            step_scale = row_scale
            if k_scale is not None:
                step_scale = row_scale * tl.load(k_scales + column)
            k_tile = load_rows(k, key, keys, kv_head, stride_kn, stride_kh, stride_kd, D, BLOCK_N, False, DESCRIPTORS)
            if PV_FP8:
                v_tile = load_columns(v, key, kv_head, stride_vh, stride_vd, stride_vn, D, BLOCK_N, DESCRIPTORS)
                step_v_scale = tl.load(v_scale + kv_head * key_blocks + column)
            else:
                v_tile = load_rows(
                    v, key, keys, kv_head, stride_vn, stride_vh, stride_vd, D, BLOCK_N, False, DESCRIPTORS
                )
                step_v_scale = 1.0
            if BOUNDED:
                acc, row_sum, other = attend_bounded(
                    q_tile, k_tile, v_tile, acc, row_sum, other, step_scale, None, False, lse is not None, BIASED
                )
            else:
                acc, row_sum, other = attend(
                    q_tile, k_tile, v_tile, acc, row_sum, other, step_scale, step_v_scale, None, False, PV_FP8, BIASED
                )

        for step in tl.range(n_full * STEPS, n_all * STEPS, num_stages=1):
            at = start + step // STEPS
            column = tl.load(columns + at)
            part = step % STEPS
            key = column * BLOCK + part * BLOCK_N
            step_scale = row_scale
            if k_scale is not None:
                step_scale = row_scale * tl.load(k_scales + column)
            mask = mask_bits + tl.load(mask_ids + at).to(tl.int64) * (BLOCK * WORDS) + part * (BLOCK_N // 32)
            word = (half + tl.arange(0, BLOCK_M))[:, None] * WORDS + tl.arange(0, BLOCK_N // 32)[None, :]
            bits = tl.load(mask + word)[:, :, None] >> tl.arange(0, 32)[None, None, :]
            visible = tl.reshape(bits & 1, (BLOCK_M, BLOCK_N)) != 0
            k_tile = load_rows(k, key, keys, kv_head, stride_kn, stride_kh, stride_kd, D, BLOCK_N, True, DESCRIPTORS)
            if PV_FP8:
                v_tile = load_columns(v, key, kv_head, stride_vh, stride_vd, stride_vn, D, BLOCK_N, DESCRIPTORS)
                step_v_scale = tl.load(v_scale + kv_head * key_blocks + column)
            else:
                v_tile = load_rows(
                    v, key, keys, kv_head, stride_vn, stride_vh, stride_vd, D, BLOCK_N, True, DESCRIPTORS
                )
                step_v_scale = 1.0
            if BOUNDED:
                acc, row_sum, other = attend_bounded(
                    q_tile, k_tile, v_tile, acc, row_sum, other, step_scale, visible, True, lse is not None, BIASED
                )
            else:
                acc, row_sum, other = attend(
                    q_tile, k_tile, v_tile, acc, row_sum, other, step_scale, step_v_scale, visible, True, PV_FP8, BIASED
                )

        row_sum = tl.where(row_sum == 0, 1.0, row_sum)  # no key: 0 / 1, and an LSE of -inf + 0; NaN stays
        factor = 1.0 / row_sum
        if gate is not None:
            factor *= tl.load(gate + query.to(tl.int64) * HEADS_Q + head, mask=live, other=0.0)
        if out_scale is not None:
            factor *= 1.0 / tl.load(out_scale)
        result = acc * factor[:, None]
        # On sm_90 e4m3 spills 8 bytes in the second form with Triton 3.6.0, bf16 in the first with 3.7.1.
        if PV_FP8:  # only the tile's first row is multiplied in int64: 128 rows of heads fit int32
            place = out + (first_query.to(tl.int64) * HEADS_Q + head) * D
            place += (tl.arange(0, BLOCK_M) * (HEADS_Q * D))[:, None] + channel[None, :]
        else:
            token = query.to(tl.int64) * HEADS_Q + head
            place = out + token[:, None] * D + channel[None, :]
        if out_scale is not None:
            tl.store(place, to_e4m3(result), mask=live[:, None])
        else:
            tl.store(place, result.to(tl.bfloat16), mask=live[:, None])

        if lse is not None:
            if BOUNDED:
                log_sum = tl.log2(other)
            else:
                log_sum = other + tl.log2(row_sum)
            if PV_FP8:
                log_sum -= P_EXPONENT
            tl.store(lse + head.to(tl.int64) * queries + query, log_sum * LOG_2, mask=live)
