"""The Triton implementation of the choice of blocks as an op; shapes are those of ops/select_blocks.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.kernels.launch import FP_FUSION, config_for
from happyhorse_fast.kernels.select_blocks import order_rows_kernel, pool_blocks_kernel, select_blocks_kernel
from happyhorse_fast.ops.select_blocks import empty_results, fake
from happyhorse_fast.ops.triton.device import architecture, on_device
from happyhorse_fast.ops.triton.library import kernel_op, launchable

STEM = "select_blocks"
POOLS = {torch.bfloat16: "pool_bf16", torch.int8: "pool_int8", torch.float8_e4m3fn: "pool_fp8"}


@kernel_op("happyhorse_fast::select_blocks", kernel=select_blocks_kernel)
def select_blocks(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    prefix: Tensor,
    live: Tensor,
    inverse: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    keep: int,
    mass: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`happyhorse_fast.ops.select_blocks.select_blocks`, which checks the arguments."""
    counts, starts, columns, mask_ids, order = empty_results(k, table)
    # Tokens may be symbolic while torch traces; what the kernels are compiled for may not.
    heads_q, heads_kv, d, blocks = int(q.shape[1]), int(k.shape[1]), int(q.shape[2]), int(table.shape[0])
    group, rows = heads_q // heads_kv, heads_kv * blocks
    if rows == 0:
        return counts, starts, columns, mask_ids, order
    arch = architecture(q.device)
    pool, choice, ordering = (config_for(STEM, name, arch) for name in (POOLS[q.dtype], "select", "order"))
    # int8 codes are multiplied before they are added up, e4m3's sums of a block after it.
    scales, none = (q_scale, k_scale), (None, None)
    of_values, of_sums = (scales, none) if q.dtype == torch.int8 else (none, scales)
    pooled_q = torch.empty(heads_q, blocks, d, dtype=torch.float32, device=q.device)
    pooled_k = torch.empty(heads_kv, d, blocks, dtype=torch.float32, device=q.device)
    with on_device(q):
        launchable(pool_blocks_kernel)[(blocks, heads_q + heads_kv)](
            q,
            k,
            *of_values,
            live,
            pooled_q,
            pooled_k,
            blocks,
            *q.stride(),
            *k.stride(),
            HEADS_Q=heads_q,
            D=d,
            BLOCK=BLOCK,
            ROWS=pool.block_m,
            num_warps=pool.num_warps,
            num_stages=pool.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
        launchable(select_blocks_kernel)[(rows,)](
            pooled_q,
            pooled_k,
            table,
            prefix,
            inverse,
            *of_sums,
            counts,
            starts,
            columns,
            mask_ids,
            keep,
            mass,
            d**-0.5 / (group if mean else 1),
            blocks,
            GROUP=group,
            PADDED_GROUP=triton.next_power_of_2(group),
            D=d,
            BLOCKS=triton.next_power_of_2(blocks),
            MEAN=mean,
            BY_MASS=keep == 0,
            num_warps=choice.num_warps,
            num_stages=choice.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
        launchable(order_rows_kernel)[(triton.cdiv(rows, ordering.block_m),)](
            counts,
            order,
            rows,
            BLOCK_M=ordering.block_m,
            BLOCK_N=ordering.block_n,
            num_warps=ordering.num_warps,
            num_stages=ordering.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
    return counts, starts, columns, mask_ids, order


select_blocks.register_fake(fake)
