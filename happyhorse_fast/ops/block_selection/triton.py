"""Launchers of the Triton kernels of `select_blocks`; their arguments were checked."""

from __future__ import annotations

import torch
import triton

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.block_map.dynamic import Parts
from happyhorse_fast.kernels.block_selection import order_rows_kernel, pool_blocks_kernel, select_blocks_kernel
from happyhorse_fast.kernels.launch import config_for
from happyhorse_fast.ops.block_selection.contract import SelectBlocks
from happyhorse_fast.ops.quantize import FORMATS
from happyhorse_fast.ops.runtime.triton.device import architecture
from happyhorse_fast.ops.runtime.triton.library import kernel_op

STEM = "block_selection"


@kernel_op("select_blocks", SelectBlocks, kernel=select_blocks_kernel)
def select_blocks(given: SelectBlocks) -> Parts:
    """Launch the sums of blocks, the choice and the order of rows."""
    q, k, table = given.q, given.k, given.table
    counts, starts, columns, mask_ids, order = results = given.empty()
    heads_q, heads_kv, d, blocks = q.shape[1], k.shape[1], q.shape[2], table.shape[0]
    group, rows = heads_q // heads_kv, heads_kv * blocks
    if rows == 0:
        return results
    arch = architecture(q.device)
    pool, choice, ordering = (config_for(STEM, name, arch) for name in (f"pool_{FORMATS[q.dtype]}", "select", "order"))
    # int8 codes are multiplied before they are added up, e4m3's sums of a block after it.
    scales, none = (given.q_scale, given.k_scale), (None, None)
    of_values, of_sums = (scales, none) if q.dtype == torch.int8 else (none, scales)
    pooled_q = torch.empty(heads_q, blocks, d, dtype=torch.float32, device=q.device)
    pooled_k = torch.empty(heads_kv, d, blocks, dtype=torch.float32, device=q.device)
    pool_blocks_kernel[(blocks, heads_q + heads_kv)](
        q,
        k,
        *of_values,
        given.live,
        pooled_q,
        pooled_k,
        blocks,
        *q.stride(),
        *k.stride(),
        HEADS_Q=heads_q,
        D=d,
        BLOCK=BLOCK,
        ROWS=pool.block_m,
        **pool.options(),
    )
    select_blocks_kernel[(rows,)](
        pooled_q,
        pooled_k,
        table,
        given.prefix,
        given.inverse,
        *of_sums,
        counts,
        starts,
        columns,
        mask_ids,
        given.keep,
        given.mass,
        d**-0.5 / (group if given.mean else 1),
        blocks,
        GROUP=group,
        PADDED_GROUP=triton.next_power_of_2(group),
        D=d,
        BLOCKS=triton.next_power_of_2(blocks),
        MEAN=given.mean,
        BY_MASS=given.keep == 0,
        **choice.options(),
    )
    order_rows_kernel[(triton.cdiv(rows, ordering.block_m),)](
        counts,
        order,
        rows,
        BLOCK_M=ordering.block_m,
        BLOCK_N=ordering.block_n,
        **ordering.options(),
    )
    return results
