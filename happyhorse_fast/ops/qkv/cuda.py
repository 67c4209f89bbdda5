"""Launchers of the CUDA kernels of QKV: RMSNorm, and the epilogue alone and behind products of torch's library."""

from __future__ import annotations

from torch import Tensor

from happyhorse_fast.kernels.launch import ROW_TILE
from happyhorse_fast.ops.qkv.contract import QKV, RESULTS, QkNormRope, QkvLinear, RmsnormQuantize
from happyhorse_fast.ops.quantize import DTYPES, E4M3, FORMATS, INT8
from happyhorse_fast.ops.runtime.cuda.launch import launch
from happyhorse_fast.ops.runtime.cuda.library_product import RowTiles, products
from happyhorse_fast.ops.runtime.cuda.parameters import Parameters, address, require_vectors, struct
from happyhorse_fast.ops.runtime.operation import custom_op

WARP = 32
# Of csrc/device/rmsnorm_quantize.cu: a thread holds up to 8 vectors of 4 channels.
VECTORS_PER_THREAD, VECTOR = 8, 4
SCRATCH_BYTES = 2 * WARP * 4
# Of csrc/device/qk_norm_rope.cu.
THREADS, VECTOR_BYTES = 256, 16
ROWS_PER_BLOCK = THREADS // WARP
# Both number formats in the order of `DTYPES`.
RmsnormQuantizeParams = struct("RmsnormQuantizeParams", "rmsnorm_quantize.cu")
QkNormRopeParams = struct("QkNormRopeParams", "qk_norm_rope.cu", RowTiles=RowTiles)


@custom_op("rmsnorm_quantize_cuda", RmsnormQuantize)
def rmsnorm_quantize(given: RmsnormQuantize) -> tuple[Tensor, Tensor]:
    """Launch the kernel, a block for each row of a tile."""
    hidden, branch, row_tiles = given.hidden, given.branch, given.row_tiles
    require_vectors(VECTOR, hidden=hidden, branch=branch, norm_weight=given.norm_weight)
    x, scale = given.empty()
    channels = hidden.shape[1]
    params = RmsnormQuantizeParams.of(
        given,
        x=x,
        scale=scale,
        hidden_stride=hidden.stride(0),
        branch_stride=0 if branch is None else branch.stride(0),
        channels=channels,
        format=[*DTYPES].index(given.out),
    )
    threads = WARP * -(-channels // (VECTOR * VECTORS_PER_THREAD * WARP))
    grid = (ROW_TILE, row_tiles.shape[0], 1)
    launch("rmsnorm_quantize", "rmsnorm_quantize", params, grid, threads, SCRATCH_BYTES, hidden)
    return x, scale


@custom_op("qkv_linear_cuda", QkvLinear)
def qkv_linear(given: QkvLinear) -> QKV:
    """A product of torch's library in chunks of rows, each followed by the kernels of its epilogue."""
    results = given.empty()
    for product, rows, tiles in products(given.x, given.weight, given.row_tiles, whole_tiles=given.out != "bf16"):
        finish_rows(given.epilogue(product), rows, tiles, results)
    return results


@custom_op("qk_norm_rope_cuda", QkNormRope)
def qk_norm_rope(given: QkNormRope) -> QKV:
    """Launch the kernels on all rows."""
    results = given.empty()
    finish_rows(given, RowTiles(table=address(given.row_tiles)), given.row_tiles.shape[0], results)
    return results


def finish_rows(given: QkNormRope, rows: Parameters, tiles: int, results: QKV) -> None:
    """Write what a product becomes to those rows of ``results`` that ``rows`` names, in ``tiles`` row tiles.

    The product starts with row ``rows.first``; everything else has all rows and experts.

    Raises:
        ValueError: Rows or addresses are not what 16-byte loads need.
    """
    product = given.product
    require_vectors(VECTOR_BYTES // product.element_size(), product=product)
    require_vectors(VECTOR_BYTES // 4, column_scale=given.column_scale, qk_norm=given.qk_norm, cos_sin=given.cos_sin)
    (q, k, v, *_), head_dim = results, given.cos_sin.shape[1]
    params = QkNormRopeParams.of(
        given,
        **dict(zip(RESULTS, results, strict=True)),
        rows=rows,
        product_stride=product.stride(0),
        blocks=-(-q.shape[0] // ROW_TILE),
        features=product.shape[1],
        heads_q=q.shape[1],
        heads_kv=k.shape[1],
        head_dim=head_dim,
        format=[*DTYPES].index(FORMATS[q.dtype]),
    )
    launch("qk_norm_rope", "qk_norm_rope", params, (ROW_TILE // ROWS_PER_BLOCK, tiles, 1), THREADS, 0, product)
    of_k_or_v = (k.shape[1], tiles, 1)
    if q.dtype == INT8:
        launch("qk_norm_rope", "quantize_k", params, of_k_or_v, THREADS, WARP * 4, product)
    if v.dtype == E4M3:
        shared_bytes = ROW_TILE * head_dim * product.element_size() + (ROW_TILE + THREADS // WARP) * 4
        launch("qk_norm_rope", "quantize_v", params, of_k_or_v, THREADS, shared_bytes, product)
