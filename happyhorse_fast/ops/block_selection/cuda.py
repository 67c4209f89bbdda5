"""Launchers of the CUDA kernels of `select_blocks`; their arguments were checked."""

from __future__ import annotations

from typing import Any

import torch

from happyhorse_fast.block_map.dynamic import Parts
from happyhorse_fast.ops.block_selection.contract import SelectBlocks
from happyhorse_fast.ops.quantize import FORMATS
from happyhorse_fast.ops.runtime.cuda.launch import launch
from happyhorse_fast.ops.runtime.cuda.parameters import Parameters, struct
from happyhorse_fast.ops.runtime.operation import custom_op

STEM = "select_blocks"
RESULTS = ("counts", "starts", "columns", "mask_ids", "order")
WARP, VECTOR_BYTES = 32, 16
# Of csrc/device/select_blocks.cu: threads and shared memory of its kernels, in bytes.
POOL_THREADS = 128
SCORE_THREADS, SCORE_ROWS, SCORE_COLUMNS = 256, 128, 64
SCORE_BYTES = 4 * 32 * (SCORE_ROWS + 4 + SCORE_COLUMNS + 4)
COLUMNS_PER_THREAD = 8
SELECT_BYTES = 2 * WARP * 8 + 2 * WARP * 4 + WARP * 4
ORDER_THREADS = 256
ORDER_BYTES = 2 * ORDER_THREADS * 4

Strided = struct("Strided", "block_pool.cuh")
PoolBlocksParams = struct("PoolBlocksParams", "block_pool.cuh", Strided=Strided)
ScoreBlocksParams = struct("ScoreBlocksParams", "select_blocks.cu")
SelectBlocksParams = struct("SelectBlocksParams", "select_blocks.cu")
OrderRowsParams = struct("OrderRowsParams", "select_blocks.cu")


def strided(x: torch.Tensor) -> Parameters:
    """A tensor of any strides; channels that lie together and aligned are read 16 bytes at once, others one by one."""
    row, head, channel = x.stride()
    apart = [stride * x.element_size() for stride, size in zip((row, head), x.shape[:2], strict=True) if size > 1]
    vectors = channel == 1 and not any(size % VECTOR_BYTES for size in (x.data_ptr(), *apart))
    return Strided(x.data_ptr(), row, head, channel, vectors)


def select_threads(blocks: int) -> int:
    """Threads that hold a row of ``blocks`` columns."""
    return WARP * -(-blocks // (WARP * COLUMNS_PER_THREAD))


@custom_op("select_blocks_cuda", SelectBlocks)
def select_blocks(given: SelectBlocks) -> Parts:
    """Launch the sums of blocks, the scores, the choice and the order of rows.

    Takes a workspace of 4 * (Hkv * S^2 + (Hq + Hkv) * S * D) bytes: 20 MiB for 5 s at 1080p, 100 MiB for 15 s.
    """
    q, k, table = given.q, given.k, given.table
    results = given.empty()
    heads_q, heads_kv, d, blocks = q.shape[1], k.shape[1], q.shape[2], table.shape[0]
    rows = heads_kv * blocks
    if rows == 0:
        return results
    group, score_stride = heads_q // heads_kv, -(-blocks // 4) * 4
    pooled = torch.empty(heads_q + heads_kv, blocks, d, dtype=torch.float32, device=q.device)
    scores = torch.empty(heads_kv, blocks, score_stride, dtype=torch.float32, device=q.device)
    # int8 codes are multiplied before they are added up, e4m3's sums of a block after it.
    scales, none = {"q_scale": given.q_scale, "k_scale": given.k_scale}, {"q_scale": None, "k_scale": None}
    of_values, of_sums = (scales, none) if q.dtype == torch.int8 else (none, scales)
    # Of these each struct takes what it has members for.
    sizes = {"heads_q": heads_q, "group": group, "d": d, "blocks": blocks, "score_stride": score_stride, "rows": rows}
    shared: dict[str, Any] = {"pooled": pooled, "scores": scores, **dict(zip(RESULTS, results, strict=True)), **sizes}
    fmt = [*FORMATS].index(q.dtype)
    pool = PoolBlocksParams.of(given, **shared, **of_values, q=strided(q), k=strided(k), format=fmt)
    pool_bytes = POOL_THREADS * VECTOR_BYTES // q.element_size() * 4
    launch(STEM, "pool_blocks", pool, (heads_q + heads_kv, blocks, 1), POOL_THREADS, pool_bytes, q)
    score = ScoreBlocksParams.of(given, **shared, **of_sums, scale=d**-0.5 / (group if given.mean else 1))
    tiles = (-(-blocks // SCORE_COLUMNS), -(-blocks // SCORE_ROWS), heads_kv)
    launch(STEM, "score_blocks", score, tiles, SCORE_THREADS, SCORE_BYTES, q)
    choice = SelectBlocksParams.of(given, **shared)
    launch(STEM, "select_blocks", choice, (blocks, heads_kv, 1), select_threads(blocks), SELECT_BYTES, q)
    order = OrderRowsParams.of(given, **shared)
    launch(STEM, "order_rows", order, (-(-rows // WARP), 1, 1), ORDER_THREADS, ORDER_BYTES, q)
    return results
