"""Launcher of the CUDA kernels of the `select_blocks` stem, as a torch.library op; `ops.select_blocks` has checks."""

from __future__ import annotations

import ctypes

import torch

from happyhorse_fast.ops.cuda.arguments import address
from happyhorse_fast.ops.cuda.launch import launch
from happyhorse_fast.ops.select_blocks import empty_results, fake

STEM = "select_blocks"
WARP, VECTOR_BYTES = 32, 16
# Of csrc/device/select_blocks.cu: threads and shared memory of its kernels, in bytes.
POOL_THREADS = 128
POOL_FORMATS = {torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
SCORE_THREADS, SCORE_ROWS, SCORE_COLUMNS = 256, 128, 64
SCORE_BYTES = 4 * 32 * (SCORE_ROWS + 4 + SCORE_COLUMNS + 4)
COLUMNS_PER_THREAD = 8
SELECT_BYTES = 2 * WARP * 8 + 2 * WARP * 4 + WARP * 4
ORDER_THREADS = 256
ORDER_BYTES = 2 * ORDER_THREADS * 4


class Strided(ctypes.Structure):
    """`Strided` of csrc/device/select_blocks.cu."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("vectors", ctypes.c_int),
    ]


class PoolBlocksParams(ctypes.Structure):
    """`PoolBlocksParams` of csrc/device/select_blocks.cu."""

    _fields_ = [
        ("q", Strided),
        ("k", Strided),
        ("q_scale", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("live", ctypes.c_void_p),
        ("pooled", ctypes.c_void_p),
        ("heads_q", ctypes.c_int),
        ("d", ctypes.c_int),
        ("format", ctypes.c_int),
    ]


class ScoreBlocksParams(ctypes.Structure):
    """`ScoreBlocksParams` of csrc/device/select_blocks.cu."""

    _fields_ = [
        ("pooled", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
        ("q_scale", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("heads_q", ctypes.c_int),
        ("group", ctypes.c_int),
        ("d", ctypes.c_int),
        ("blocks", ctypes.c_int),
        ("score_stride", ctypes.c_int),
        ("mean", ctypes.c_int),
    ]


class SelectBlocksParams(ctypes.Structure):
    """`SelectBlocksParams` of csrc/device/select_blocks.cu."""

    _fields_ = [
        ("scores", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("prefix", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("mask_ids", ctypes.c_void_p),
        ("blocks", ctypes.c_int),
        ("score_stride", ctypes.c_int),
        ("keep", ctypes.c_int),
        ("mass", ctypes.c_int),
    ]


class OrderRowsParams(ctypes.Structure):
    """`OrderRowsParams` of csrc/device/select_blocks.cu."""

    _fields_ = [("counts", ctypes.c_void_p), ("order", ctypes.c_void_p), ("rows", ctypes.c_int)]


def strided(x: torch.Tensor) -> Strided:
    """A tensor of any strides; channels that lie together and aligned are read 16 bytes at once, others one by one."""
    row, head, channel = x.stride()
    apart = [stride * x.element_size() for stride, size in zip((row, head), x.shape[:2], strict=True) if size > 1]
    vectors = channel == 1 and not any(size % VECTOR_BYTES for size in (x.data_ptr(), *apart))
    return Strided(x.data_ptr(), row, head, channel, vectors)


def select_threads(blocks: int) -> int:
    """Threads that hold a row of ``blocks`` columns."""
    return WARP * -(-blocks // (WARP * COLUMNS_PER_THREAD))


@torch.library.custom_op("happyhorse_fast::select_blocks_cuda", mutates_args=())
def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    table: torch.Tensor,
    prefix: torch.Tensor,
    live: torch.Tensor,
    inverse: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    keep: int,
    mass: int,
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`happyhorse_fast.ops.select_blocks.select_blocks`, which checks the arguments.

    Takes a workspace of 4 * (Hkv * S^2 + (Hq + Hkv) * S * D) bytes: 20 MiB for 5 s at 1080p, 100 MiB for 15 s.
    """
    counts, starts, columns, mask_ids, order = results = empty_results(k, table)
    heads_q, heads_kv, d, blocks = q.shape[1], k.shape[1], q.shape[2], table.shape[0]
    if heads_kv * blocks == 0:
        return results
    group, score_stride = heads_q // heads_kv, -(-blocks // 4) * 4
    pooled = torch.empty(heads_q + heads_kv, blocks, d, dtype=torch.float32, device=q.device)
    scores = torch.empty(heads_kv, blocks, score_stride, dtype=torch.float32, device=q.device)
    # int8 codes are multiplied before they are added up, e4m3's sums of a block after it.
    scales, none = (q_scale, k_scale), (None, None)
    of_values, of_sums = (scales, none) if q.dtype == torch.int8 else (none, scales)
    pool = PoolBlocksParams(
        q=strided(q),
        k=strided(k),
        q_scale=address(of_values[0]),
        k_scale=address(of_values[1]),
        live=address(live),
        pooled=address(pooled),
        heads_q=heads_q,
        d=d,
        format=POOL_FORMATS[q.dtype],
    )
    pool_bytes = POOL_THREADS * VECTOR_BYTES // q.element_size() * 4
    launch(STEM, "pool_blocks", pool, (heads_q + heads_kv, blocks, 1), POOL_THREADS, pool_bytes, q)
    score = ScoreBlocksParams(
        pooled=address(pooled),
        inverse=address(inverse),
        q_scale=address(of_sums[0]),
        k_scale=address(of_sums[1]),
        scores=address(scores),
        scale=d**-0.5 / (group if mean else 1),
        heads_q=heads_q,
        group=group,
        d=d,
        blocks=blocks,
        score_stride=score_stride,
        mean=mean,
    )
    tiles = (-(-blocks // SCORE_COLUMNS), -(-blocks // SCORE_ROWS), heads_kv)
    launch(STEM, "score_blocks", score, tiles, SCORE_THREADS, SCORE_BYTES, q)
    choice = SelectBlocksParams(
        scores=address(scores),
        table=address(table),
        prefix=address(prefix),
        counts=address(counts),
        starts=address(starts),
        columns=address(columns),
        mask_ids=address(mask_ids),
        blocks=blocks,
        score_stride=score_stride,
        keep=keep,
        mass=mass,
    )
    launch(STEM, "select_blocks", choice, (blocks, heads_kv, 1), select_threads(blocks), SELECT_BYTES, q)
    rows = heads_kv * blocks
    ordering = OrderRowsParams(counts=address(counts), order=address(order), rows=rows)
    launch(STEM, "order_rows", ordering, (-(-rows // WARP), 1, 1), ORDER_THREADS, ORDER_BYTES, q)
    return results


select_blocks.register_fake(fake)
