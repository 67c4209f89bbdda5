"""Launchers of the CUDA kernels of QKV: RMSNorm, and the epilogue alone and behind products of torch's library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from happyhorse_fast.ops.qkv.contract import NORMALISED, OUTPUTS, QKV, QkNormRope, QkvLinear, RmsnormQuantize
from happyhorse_fast.ops.quantize import BF16
from happyhorse_fast.ops.runtime.cuda.arguments import address, require_vectors
from happyhorse_fast.ops.runtime.cuda.launch import launch
from happyhorse_fast.ops.runtime.cuda.library_product import check_operands, library_product, scale_of_one
from happyhorse_fast.ops.runtime.cuda.row_spans import RowTiles, chunks, expert_spans
from happyhorse_fast.ops.runtime.operation import custom_op
from happyhorse_fast.ops.runtime.row_tiles import ROW_TILE

WARP = 32
# Of csrc/device/rmsnorm_quantize.cu: a thread holds up to 8 vectors of 4 channels.
VECTORS_PER_THREAD, VECTOR = 8, 4
SCRATCH_BYTES = 2 * WARP * 4
# Of csrc/device/qk_norm_rope.cu.
THREADS, VECTOR_BYTES = 256, 16
ROWS_PER_BLOCK = THREADS // WARP
# Both number the formats bf16, int8 and fp8 in this order.


class RmsnormQuantizeParams(ctypes.Structure):
    """`RmsnormQuantizeParams` of csrc/device/rmsnorm_quantize.cu."""

    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("branch", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("row_tiles", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("branch_stride", ctypes.c_int64),
        ("channels", ctypes.c_int),
        ("format", ctypes.c_int),
    ]


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


@custom_op("rmsnorm_quantize_cuda", RmsnormQuantize)
def rmsnorm_quantize(given: RmsnormQuantize) -> tuple[Tensor, Tensor]:
    """Launch the kernel, a block for each row of a tile."""
    hidden, branch, row_tiles = given.hidden, given.branch, given.row_tiles
    require_vectors(VECTOR, hidden=hidden, branch=branch, norm_weight=given.norm_weight)
    x, scale = given.empty()
    channels = hidden.shape[1]
    params = RmsnormQuantizeParams(
        hidden=address(hidden),
        branch=address(branch),
        norm_weight=address(given.norm_weight),
        row_tiles=address(row_tiles),
        x=address(x),
        scale=address(scale),
        hidden_stride=hidden.stride(0),
        branch_stride=0 if branch is None else branch.stride(0),
        channels=channels,
        format=[*NORMALISED].index(given.out),
    )
    threads = WARP * -(-channels // (VECTOR * VECTORS_PER_THREAD * WARP))
    grid = (ROW_TILE, row_tiles.shape[0], 1)
    launch("rmsnorm_quantize", "rmsnorm_quantize", params, grid, threads, SCRATCH_BYTES, hidden)
    return x, scale


@custom_op("qkv_linear_cuda", QkvLinear)
def qkv_linear(given: QkvLinear) -> QKV:
    """A product of torch's library in chunks of rows, each followed by the kernels of its epilogue."""
    x, weight, results = given.x, given.weight, given.empty()
    check_operands(x, weight)
    experts, features, _ = weight.shape
    spans = expert_spans(given.row_tiles, experts, x.shape[0], whole_tiles=given.out != "bf16")
    one = scale_of_one(x)
    for expert, first, end in chunks(spans, features, 2 if x.dtype == BF16 else 4):
        product = library_product(x[first:end], weight[expert], one)
        rows = RowTiles(table=None, expert=expert, first=first, end=end)
        finish_rows(given.epilogue(product), rows, -(-(end - first) // ROW_TILE), results)
    return results


@custom_op("qk_norm_rope_cuda", QkNormRope)
def qk_norm_rope(given: QkNormRope) -> QKV:
    """Launch the kernels on all rows."""
    results = given.empty()
    finish_rows(given, RowTiles(table=address(given.row_tiles)), given.row_tiles.shape[0], results)
    return results


def finish_rows(given: QkNormRope, rows: RowTiles, tiles: int, results: QKV) -> None:
    """Write what a product becomes to those rows of ``results`` that ``rows`` names, in ``tiles`` row tiles.

    The product starts with row ``rows.first``; everything else has all rows and experts.

    Raises:
        ValueError: Rows or addresses are not what 16-byte loads need.
    """
    product = given.product
    require_vectors(VECTOR_BYTES // product.element_size(), product=product)
    require_vectors(VECTOR_BYTES // 4, column_scale=given.column_scale, qk_norm=given.qk_norm, cos_sin=given.cos_sin)
    q, k, v, q_scale, k_scale, v_scale, gate = results
    head_dim = given.cos_sin.shape[1]
    params = QkNormRopeParams(
        product=address(product),
        row_scale=address(given.row_scale),
        column_scale=address(given.column_scale),
        qk_norm=address(given.qk_norm),
        cos_sin=address(given.cos_sin),
        qk_scale=address(given.qk_scale),
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
        format=[*OUTPUTS].index(given.out),
    )
    launch("qk_norm_rope", "qk_norm_rope", params, (ROW_TILE // ROWS_PER_BLOCK, tiles, 1), THREADS, 0, product)
    of_k_or_v = (k.shape[1], tiles, 1)
    if q.dtype == torch.int8:
        launch("qk_norm_rope", "quantize_k", params, of_k_or_v, THREADS, WARP * 4, product)
    elif q.dtype == torch.float8_e4m3fn:
        shared_bytes = ROW_TILE * head_dim * product.element_size() + (ROW_TILE + THREADS // WARP) * 4
        launch("qk_norm_rope", "quantize_v", params, of_k_or_v, THREADS, shared_bytes, product)
