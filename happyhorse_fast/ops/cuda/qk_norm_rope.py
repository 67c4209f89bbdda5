"""Launcher of the CUDA kernels of `qk_norm_rope`, as a torch.library op; `ops.qk_norm_rope` checks arguments."""

from __future__ import annotations

import ctypes

import torch

from happyhorse_fast.ops import qk_norm_rope as shapes
from happyhorse_fast.ops.cuda.arguments import address, require_vectors
from happyhorse_fast.ops.cuda.launch import launch
from happyhorse_fast.ops.cuda.row_spans import RowTiles
from happyhorse_fast.ops.rmsnorm_qkv import ROW_TILE
from happyhorse_fast.reference.quantized_qkv import QKV, empty_qkv

STEM = "qk_norm_rope"
# Of csrc/device/qk_norm_rope.cu.
THREADS, WARP, VECTOR_BYTES = 256, 32, 16
FORMATS = {torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
"""Of q and k."""
ROWS_PER_BLOCK = THREADS // WARP


class QkNormRopeParams(ctypes.Structure):
    """`QkNormRopeParams` of csrc/device/qk_norm_rope.cu."""

    _fields_ = [
        ("product", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("qk_norm", ctypes.c_void_p),
        ("cos_sin", ctypes.c_void_p),
        ("qk_scale", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("q_scale", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("rows", RowTiles),
        ("product_stride", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("features", ctypes.c_int),
        ("heads_q", ctypes.c_int),
        ("heads_kv", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("format", ctypes.c_int),
    ]


def finish_rows(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    qk_scale: torch.Tensor | None,
    rows: RowTiles,
    tiles: int,
    results: QKV,
) -> None:
    """Write what a product becomes to those rows of ``results`` that ``rows`` names, in ``tiles`` row tiles.

    The product starts with row ``rows.first``; everything else has all rows and experts.

    Raises:
        ValueError: Rows or addresses are not what 16-byte loads need.
    """
    require_vectors(VECTOR_BYTES // product.element_size(), product=product)
    require_vectors(VECTOR_BYTES // 4, column_scale=column_scale, qk_norm=qk_norm, cos_sin=cos_sin)
    q, k, v, q_scale, k_scale, v_scale, gate = results
    head_dim = cos_sin.shape[1]
    params = QkNormRopeParams(
        product=address(product),
        row_scale=address(row_scale),
        column_scale=address(column_scale),
        qk_norm=address(qk_norm),
        cos_sin=address(cos_sin),
        qk_scale=address(qk_scale),
        q=address(q),
        k=address(k),
        v=address(v),
        q_scale=address(q_scale),
        k_scale=address(k_scale),
        v_scale=address(v_scale),
        gate=address(gate),
        rows=rows,
        product_stride=product.stride(0),
        blocks=-(-q.shape[0] // ROW_TILE),
        features=product.shape[1],
        heads_q=q.shape[1],
        heads_kv=k.shape[1],
        head_dim=head_dim,
        format=FORMATS[q.dtype],
    )
    launch(STEM, "qk_norm_rope", params, (ROW_TILE // ROWS_PER_BLOCK, tiles, 1), THREADS, 0, product)
    of_k_or_v = (k.shape[1], tiles, 1)
    if q.dtype == torch.int8:
        launch(STEM, "quantize_k", params, of_k_or_v, THREADS, WARP * 4, product)
    elif q.dtype == torch.float8_e4m3fn:
        shared_bytes = ROW_TILE * head_dim * product.element_size() + (ROW_TILE + THREADS // WARP) * 4
        launch(STEM, "quantize_v", params, of_k_or_v, THREADS, shared_bytes, product)


@torch.library.custom_op("happyhorse_fast::qk_norm_rope_cuda", mutates_args=())
def qk_norm_rope(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    row_tiles: torch.Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`happyhorse_fast.ops.qk_norm_rope.qk_norm_rope`."""
    results = empty_qkv(cos_sin, num_heads_q, num_heads_kv, out)
    rows = RowTiles(table=address(row_tiles))
    tiles = row_tiles.shape[0]
    finish_rows(product, row_scale, column_scale, qk_norm, cos_sin, qk_scale, rows, tiles, results)
    return results


qk_norm_rope.register_fake(shapes.fake_qk_norm_rope)
