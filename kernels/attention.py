"""Block-sparse attention, one softmax over a block map; docs/OPS.md states tensors and rounding.

The softmax has two forms. With a running maximum it is FlashAttention's. Where the scores are known to be bounded
(`ops.attention.score_bound`) there is no maximum to find, to exchange between threads, or to correct for.

A work item is one row of the map (128 queries, or half of them) and one query head. The grid is persistent. Rows come
longest first; heads that share a row are consecutive items, so that they read k and v from L2.

Predicted per tile of 128 queries, 128 keys and head dim 128: 8.4 MFLOP, and 64 KiB of k and v in bf16, 32 in fp8. That
is 128 and 256 FLOP per byte from L2, five times that per byte from memory with five heads a group. An SM of an H100
takes 2048 cycles of tensor cores in bf16, 1024 in fp8, and 1024 cycles of exponents. Two warp groups can hide the
exponents behind each other's products in bf16, but not in fp8.
"""

import triton
import triton.language as tl

from happyhorse_fast.kernels.numerics import to_e4m3

P_EXPONENT = tl.constexpr(8.0)
"""P is multiplied by 2^8 before its cast to e4m3: at most 256, it needs no clamp, and P down to 2^-17 is not lost."""
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
    """Load [ROWS, D] of a head from row ``first``. With MASKED, rows from ``end`` on are 0 and not read.

    Offsets are int64: in a packed or transposed tensor they pass 2^31 elements at 1080p and 10 s.
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
    """Load [D, COLUMNS] of a head of the transposed v, which is stored up to a whole block: no mask."""
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
    """Permute P's columns to v's fragment order (docs/OPS.md); on sm_89, 90 and 120 no value changes threads."""
    ROWS: tl.constexpr = p.shape[0]
    COLUMNS: tl.constexpr = p.shape[1]
    split = tl.reshape(p, (ROWS, COLUMNS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(split, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))


@triton.jit
def rounded(p):
    """Round P to bf16; return it as bf16 and as float32.

    PTX converts two values at once. Written as casts, ptxas would convert one by one, in the unit of the exponents,
    because P is both multiplied and added up.
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
    """Multiply q and k, in float32. int32 sums of int8 codes are at most 127 * 127 * 128, which float32 holds exactly.

    With BIASED an int32 sum s starts as the bits of 1.5 * 2^23, so that it ends as the bits of 1.5 * 2^23 + s. A
    subtraction then gives s in float32. sm_80's only conversion has a quarter of a subtraction's rate, in the unit of
    the exponents.
    """
    if BIASED:
        start = tl.full([q.shape[0], k.shape[0]], 0x4B400000, dtype=tl.int32)
        s = tl.dot(q, tl.trans(k), start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - 12582912.0
    else:
        s = tl.dot(q, tl.trans(k)).to(tl.float32)
    return s


@triton.jit
def over_rows(scale):
    """Make a column of one scale per row; return a single scale as it is."""
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
    """Run one step with a running maximum, in base 2: (acc, row_sum, row_max) after the keys in ``k``.

    ``scale`` > 0 includes log2(e) and the scales of q and k, as one number or one per row. ``v_scale`` is of this
    step's v alone, so PV is not accumulated in the tensor core but added to ``acc`` in float32.
    """
    s = scores(q, k, BIASED)
    if MASKED:  # after scaling: a scale may round to 0, and -inf * 0 would be NaN
        s = tl.where(visible, s * over_rows(scale), -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
    else:
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * scale)
        s = s * over_rows(scale)
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # for a row without a key so far -inf - -inf is NaN
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
    """Run one step without a maximum, in base 2: (acc, row_sum, log_sum) after the keys in ``k``.

    ``row_sum`` adds P after rounding to bf16, as PV multiplies it; ``log_sum`` adds P before that, with LSE.
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
    """Compute every work item of a launch. ``scale`` is the softmax scale times log2(e); BLOCK is the map's, 128.

    Strides of v are of (key, head, channel), in either layout. q_scale and k_scale come with q and k of 8 bits: per
    token and head, and per head and block, in int8; per block in e4m3. v_scale comes with e4m3 v. out_scale asks for
    e4m3 output. lse and gate are None where they are not wanted. A ``flag`` other than 0 lets the bounded form run, 0
    the other one; the form it does not name returns at once. BIASED is explained at :func:`scores`. Rows of ``columns``
    list full blocks first, so that the first loop has no mask.
    """
    HALVES: tl.constexpr = BLOCK // BLOCK_M
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    BY_HEAD: tl.constexpr = q.dtype.element_ty == tl.int8  # and by row of q: scales of int8
    WORDS: tl.constexpr = BLOCK // 32  # int32 mask words of one query in a partial block
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
            column = ahead  # loaded one step ahead, so that the loads of k and v never wait for their address
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

        row_sum = tl.where(row_sum == 0, 1.0, row_sum)  # no key: 0 / 1, an LSE of -inf + 0; NaN stays NaN
        factor = 1.0 / row_sum
        if gate is not None:
            factor *= tl.load(gate + query.to(tl.int64) * HEADS_Q + head, mask=live, other=0.0)
        if out_scale is not None:
            factor *= 1.0 / tl.load(out_scale)
        result = acc * factor[:, None]
        # On sm_90, e4m3 spills 8 bytes with the else branch (Triton 3.6.0), bf16 with the if branch (3.7.1).
        if PV_FP8:  # only the first row's offset is int64: the others are within 128 rows of it
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
