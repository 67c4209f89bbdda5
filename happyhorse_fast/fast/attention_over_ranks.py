"""A layer's attention over ranks: rows become heads, attention runs a key/value head at a time, heads become rows.

Keys and values go first, then queries by key/value head; while one is attended to, the next one's queries come and the
last one's output goes. A map chosen by q and k needs all queries of such a head, so no smaller part is sent. Buffers of
two heads are there at a time: an output that comes back takes the place of queries that went.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.fast.attention import AttentionInputs, Operand
from happyhorse_fast.ops.attention.reference import output_bounds
from happyhorse_fast.ops.quantize import E4M3, E4M3_MAX, INT8, code_scale
from happyhorse_fast.parallel.group import Transfer
from happyhorse_fast.parallel.ulysses import Ulysses


def attention_over_ranks(
    inputs: list[torch.Tensor | None], ulysses: Ulysses, attend: Callable[..., Operand], *, fp8_out: bool
) -> Operand:
    """What ``attend`` gives of all heads, for the rows of this rank.

    Args:
        inputs: Fields of :class:`AttentionInputs` of this rank's M rows; the list is emptied, so that what has been
            sent can be freed.
        ulysses: The exchange.
        attend: :meth:`FastLayer.attend` of one clip and step: attention of some heads over all N rows.
        fp8_out: Whether its output is e4m3, whose one scale is of all heads on all ranks.

    Returns:
        [M, Hq * D], and its scale.

    Raises:
        RankError: A rank died, failed or did not answer in time.
    """
    q, k, v, q_scale, k_scale, v_scale, gate = inputs
    inputs.clear()
    assert q is not None and k is not None and v is not None and gate is not None
    groups, int8, e4m3 = k.shape[1] // ulysses.ranks.size, q.dtype == INT8, v.dtype == E4M3
    out_scale = _shared_scale(v, v_scale, gate, ulysses) if fp8_out else None
    if not int8:  # e4m3 q and k have a scale per tile, the same for all heads
        q_scale, k_scale = (None if x is None else ulysses.tiles(x, BLOCK) for x in (q_scale, k_scale))
    coming = [ulysses.heads_of_columns(v) if e4m3 else ulysses.heads_of_rows(v)]
    del v
    coming.append(ulysses.heads_of_rows(k))
    del k
    of_tiles = (k_scale if int8 else None, v_scale)
    coming += [ulysses.heads_of_columns(x, BLOCK) for x in of_tiles if x is not None]
    by_row = [q, gate, q_scale] if int8 else [q, gate]
    del gate
    queries = [ulysses.heads_of_rows(x, groups, 0) for x in by_row if x is not None]
    values, keys, *scales = (transfer.wait() for transfer in coming)
    del coming
    going: Transfer | None = None
    every: torch.Tensor | None = None
    for group in range(groups):
        here = [transfer.wait() for transfer in queries]
        if group + 1 < groups:
            queries = [ulysses.heads_of_rows(x, groups, group + 1) for x in by_row if x is not None]
        else:
            del queries, by_row
        head = slice(group, group + 1)
        attended, scale = attend(
            AttentionInputs(
                here[0],
                keys[:, head],
                values[head] if e4m3 else values[:, head],
                here[2] if int8 else q_scale,
                scales[0][head] if int8 else k_scale,
                scales[-1][head] if e4m3 else None,
                here[1],
            ),
            out_scale=out_scale,
        )
        del here
        if going is not None:
            every = _placed(going, group - 1, groups, every, q)
        going = ulysses.rows_of_heads(attended)
        del attended
    del keys, values
    assert going is not None
    every = _placed(going, groups - 1, groups, every, q)
    return every.flatten(1).view(torch.bfloat16 if out_scale is None else E4M3), scale


def _placed(going: Transfer, group: int, groups: int, every: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    """[M, P, groups, h * D] with the outputs of one group of heads: in the place of q, sent by then, where they fit."""
    out = going.wait()
    if every is None:
        every = q.view(out.dtype) if q.itemsize == out.itemsize else out.new_empty(q.shape)
        every = every.view(*out.shape[:2], groups, -1)
    every[:, :, group] = out
    return every


def _shared_scale(v: torch.Tensor, v_scale: torch.Tensor | None, gate: torch.Tensor, ulysses: Ulysses) -> torch.Tensor:
    """float32 [1]: the scale of attention's e4m3 output that one process would find, from the rows of every rank."""
    rows = ulysses.share.held()[ulysses.share.rank]
    bounds = gate.new_zeros(2)
    if rows:
        tiles = None if v_scale is None else v_scale[:, : rows // BLOCK]
        bounds = output_bounds(v[..., :rows] if v.dtype == E4M3 else v[:rows], tiles, gate[:rows])
    of_v, of_gate = ulysses.ranks.largest(bounds).split(1)
    return code_scale(of_v * of_gate, E4M3_MAX)
