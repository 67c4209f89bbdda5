"""Block-sparse attention over a block map, with every rounding point of the kernel, in plain torch."""

from __future__ import annotations

import math

import torch

from happyhorse_fast import ambient
from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.block_map.bits import BLOCK, unpack
from happyhorse_fast.ops.attention.contract import BlockSparseAttention
from happyhorse_fast.ops.quantize import E4M3_MAX, code_scale, quantize_static, token_order
from happyhorse_fast.ops.runtime.operation import reference_op

P_SCALE = 256.0
"""Factor of P before it becomes e4m3."""


def output_scale(v: torch.Tensor, v_scale: torch.Tensor | None, gate: torch.Tensor | None) -> torch.Tensor:
    """Scale of e4m3 outputs: |output| <= max|v| * max|gate|, whatever the scores are; without waiting for the device.

    Reads v in bf16, 131 MB at 64,256 tokens and 8 heads of 128, or no more than the scales of its codes.

    Args:
        v: [M, Hkv, D] bf16, or e4m3 [Hkv, D, S * 128] with ``v_scale``.
        v_scale: float32 [Hkv, S], whose largest times 448 bounds e4m3 v; or None. That of a block of zeros should be
            small, as :func:`ops.quantize.code_scale` makes it: other values would be nothing beside it.
        gate: float32 [N, Hq], or None.

    Returns:
        float32 [1]: max|v| * max|gate| * (1/448), at least 2^-96, of no elements too.
    """
    if v.numel() == 0 or (gate is not None and gate.numel() == 0):  # the largest of none is an error
        return code_scale(torch.zeros(1, device=v.device), E4M3_MAX)
    bound = _largest_value(v, v_scale)
    return code_scale(bound if gate is None else bound * _largest(gate), E4M3_MAX)


def output_bounds(v: torch.Tensor, v_scale: torch.Tensor | None, gate: torch.Tensor) -> torch.Tensor:
    """float32 [2], max|v| and max|gate|, whose product :func:`output_scale` makes a scale of: for heads in parts."""
    return torch.cat([_largest_value(v, v_scale), _largest(gate)])


def _largest_value(v: torch.Tensor, v_scale: torch.Tensor | None) -> torch.Tensor:
    return _largest(v) if v_scale is None else _largest(v_scale) * E4M3_MAX


def _largest(x: torch.Tensor) -> torch.Tensor:
    """max|x| as float32 [1], in one launch that reads x once and writes nothing of its size."""
    return torch.linalg.vector_norm(x, ord=math.inf, dtype=torch.float32).reshape(1)


@ambient.independent
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: BlockMap,
    *,
    scale: float,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    bounded: bool = False,
    folded: bool = False,
    out_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    step: int = BLOCK,
    wide: torch.dtype = torch.float32,
    exact_p: bool = False,
    round_out: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax per query over the blocks of its row, in the row's order: full blocks, then partial ones.

    P is rounded where the kernel rounds it: to bf16, or to e4m3 codes of 256 * exp(s - m) where v is e4m3. With a
    running maximum m it is exp(s - m), and the row sum is taken before that rounding. ``bounded`` (see
    `score_bound`) it is exp(s), and the output is divided by the sum of the rounded P: the largest P of a row
    is not 1 there, and a row of one key would be off by the rounding of that P, up to 2^-8. The LSE is of the sum
    before rounding in both.

    ``folded``, v's scale is in P before it is rounded: codes are of 256 * exp(s - m) times it, with m the maximum of
    the scores plus its logarithm. So blocks of v with large values keep more of P's bits.

    Args:
        q: [N, Hq, D] bf16; int8 codes with ``q_scale`` float32 [N, Hq]; or e4m3 codes with ``q_scale`` float32 [R].
        k: [M, Hkv, D] bf16; int8 codes with ``k_scale`` float32 [Hkv, S]; or e4m3 codes with ``k_scale`` float32 [S].
        v: [M, Hkv, D] bf16, or e4m3 [Hkv, D, S * 128] in `quantize.fragment_order` with ``v_scale`` float32 [Hkv, S].
        block_map: N queries, M keys, one head or Hkv heads.
        scale: Softmax scale.
        q_scale: See ``q``.
        k_scale: See ``k``.
        v_scale: See ``v``.
        gate: float32 [N, Hq], multiplies the normalised output.
        bounded: No maximum: p = exp(s).
        folded: P times v's scale is what becomes e4m3; with ``v_scale``, and steps of 128 keys.
        out_scale: float32 [1], for e4m3 output: codes are of result * (1 / out_scale); see :func:`output_scale`.
        return_lse: Whether the LSE is wanted.
        step: Keys per step of the online softmax: 128, or 64 or 32 as a kernel with narrower tiles goes.
        wide: Dtype of everything between the rounding points; float64 makes this the oracle of the kernels.
        exact_p: Leave P unrounded.
        round_out: Round the output; else it stays in ``wide``, also with ``out_scale``.

    Returns:
        out [N, Hq, D] bf16, or e4m3 with ``out_scale``; LSE float32 [Hq, N], size [0] without ``return_lse``. A row
        without a key gives 0 and -inf.
    """
    n, hq, d = q.shape
    hkv = k.shape[1]
    group, rows, width = hq // hkv, block_map.rows, block_map.key_blocks
    fp8_v = v_scale is not None

    queries = _blocks(q.to(wide), rows)  # [R, 128, Hq, D]
    keys = _blocks(k.to(wide), width)
    if q_scale is not None and k_scale is not None:
        if q.dtype == torch.int8:
            queries = queries * _blocks(q_scale.to(wide)[:, :, None], rows)
            keys = keys * k_scale.to(wide).T[:, None, :, None]
        else:
            queries = queries * q_scale.to(wide)[:, None, None, None]
            keys = keys * k_scale.to(wide)[:, None, None, None]
    keys = keys.permute(2, 0, 3, 1)  # [Hkv, S, D, 128]
    queries = queries.unflatten(2, (hkv, group)).permute(2, 0, 3, 1, 4)  # [Hkv, R, G, 128, D]
    if fp8_v:
        values = token_order(v).to(wide).unflatten(2, (width, BLOCK)).permute(0, 2, 3, 1)
    else:
        values = _blocks(v.to(wide), width).permute(2, 0, 1, 3)  # [Hkv, S, 128, D]

    out = torch.zeros(hkv, rows, group, BLOCK, d, dtype=wide, device=q.device)
    lse = torch.full((hkv, rows, group, BLOCK), -torch.inf, dtype=wide, device=q.device)
    masks = unpack(block_map.mask_bits)
    columns, ids = block_map.columns.tolist(), block_map.mask_ids.tolist()
    counts, starts = block_map.counts.flatten(0, 1).tolist(), block_map.starts.flatten().tolist()
    for place, ((n_full, n_all), start) in enumerate(zip(counts, starts, strict=True)):
        head, row = divmod(place, rows)
        heads = slice(None) if block_map.heads == 1 else slice(head, head + 1)
        acc, row_sum = out[heads, row], torch.zeros_like(lse[heads, row])  # [heads, G, 128, D], [heads, G, 128]
        row_max = torch.full_like(row_sum, 0.0 if bounded else -torch.inf)
        log_sum = row_sum  # before rounding, for the LSE
        for at in range(start, start + n_all):
            for part in (slice(first, first + step) for first in range(0, BLOCK, step)):
                s = (queries[heads, row] @ keys[heads, columns[at], None, :, part]) * scale  # [heads, G, 128, step]
                if at >= start + n_full:
                    s = s.masked_fill(~masks[ids[at], :, part], -torch.inf)
                v_part = (
                    v_scale[heads, columns[at], None, None, None].to(wide) if v_scale is not None else s.new_ones(())
                )
                if folded:
                    s = s + v_part.log()
                new_max = row_max if bounded else torch.maximum(row_max, s.amax(dim=-1))
                shift = torch.where(new_max == -torch.inf, 0.0, new_max)
                alpha, p = torch.exp(row_max - shift), torch.exp(s - shift.unsqueeze(-1))
                own = p / v_part if folded else p
                log_sum, row_max = log_sum * alpha + own.sum(dim=-1), new_max
                value = values[heads, columns[at], None, part]
                if not exact_p:
                    p = (p * P_SCALE).to(torch.float8_e4m3fn).to(wide) / P_SCALE if fp8_v else p.bfloat16().to(wide)
                row_sum = row_sum + p.sum(dim=-1) if bounded else log_sum
                product = p @ value
                if not folded:
                    product = product * v_part
                acc = acc * alpha.unsqueeze(-1) + product
        out[heads, row] = acc / torch.where(row_sum > 0, row_sum, 1.0).unsqueeze(-1)
        lse[heads, row] = row_max + log_sum.log()

    result = out.permute(1, 3, 0, 2, 4).reshape(-1, hq, d)[:n]
    no_sums = q.new_empty(0, dtype=torch.float32)
    sums = lse.permute(0, 2, 1, 3).reshape(hq, -1)[:, :n].float().contiguous() if return_lse else no_sums
    if gate is not None:
        result = result * gate.to(wide).unsqueeze(-1)
    if round_out:
        result = result.bfloat16() if out_scale is None else quantize_static(result, out_scale)
    return result, sums


def _blocks(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """[tokens, heads, D] -> [blocks, 128, heads, D], zeros past the end."""
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * BLOCK - x.shape[0])).unflatten(0, (blocks, BLOCK))


@reference_op(BlockSparseAttention)
def block_sparse_attention(given: BlockSparseAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sparse_attention` with the kernels' arguments."""
    tensors = given.counts, given.starts, given.columns, given.mask_ids, given.mask_bits, given.order
    return sparse_attention(
        given.q,
        given.k,
        given.v,
        BlockMap(*tensors, queries=given.q.shape[0], keys=given.k.shape[0]),
        scale=given.scale,
        q_scale=given.q_scale,
        k_scale=given.k_scale,
        v_scale=given.v_scale,
        gate=given.gate,
        bounded=given.bounded if given.flag is None else bool(given.flag),
        out_scale=given.out_scale,
        return_lse=given.return_lse,
    )
