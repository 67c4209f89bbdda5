"""Launcher of the CUDA kernel `activation_quantize`, as a torch.library op; its arguments were checked."""

from __future__ import annotations

import ctypes

import torch

from happyhorse_fast.ops import activation_quantize as shapes
from happyhorse_fast.ops.cuda.arguments import address, require_vectors
from happyhorse_fast.ops.cuda.launch import launch
from happyhorse_fast.ops.cuda.row_spans import RowTiles
from happyhorse_fast.ops.fp8_linear import ROW_TILE
from happyhorse_fast.reference.fp8_linear import activation_scale, empty_activated

# Of csrc/device/activation_quantize.cu.
THREADS, ROWS_PER_BLOCK, VECTOR_BYTES = 256, 16, 16


class ActivationQuantizeParams(ctypes.Structure):
    """`ActivationQuantizeParams` of csrc/device/activation_quantize.cu."""

    _fields_ = [
        ("product", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", RowTiles),
        ("product_stride", ctypes.c_int64),
        ("features", ctypes.c_int),
        ("gated", ctypes.c_int),
        ("inverse_scale", ctypes.c_float),
    ]


def finish_rows(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    rows: RowTiles,
    tiles: int,
    activation: str,
    y: torch.Tensor,
) -> None:
    """Write the activation of a product to those rows of ``y`` that ``rows`` names, in ``tiles`` row tiles.

    The product starts with row ``rows.first``; everything else has all rows and experts.

    Raises:
        ValueError: Rows or addresses are not what 16-byte loads need.
    """
    values = VECTOR_BYTES // product.element_size()
    require_vectors(values, product=product)
    require_vectors(VECTOR_BYTES // 4, column_scale=column_scale)
    features = product.shape[1]
    params = ActivationQuantizeParams(
        product=address(product),
        row_scale=address(row_scale),
        column_scale=address(column_scale),
        y=address(y),
        rows=rows,
        product_stride=product.stride(0),
        features=features,
        gated=activation == "swiglu7",
        inverse_scale=1.0 / activation_scale(activation) if y.dtype == torch.float8_e4m3fn else 0.0,
    )
    grid = (-(-features // (THREADS * values)), tiles, ROW_TILE // ROWS_PER_BLOCK)
    launch("activation_quantize", "activation_quantize", params, grid, THREADS, 0, product)


@torch.library.custom_op("happyhorse_fast::activation_quantize_cuda", mutates_args=())
def activation_quantize(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
) -> torch.Tensor:
    """See :func:`happyhorse_fast.ops.activation_quantize.activation_quantize`."""
    y = empty_activated(product.shape[0], product.shape[1], activation, fp8, product.device)
    rows = RowTiles(table=address(row_tiles))
    finish_rows(product, row_scale, column_scale, rows, row_tiles.shape[0], activation, y)
    return y


activation_quantize.register_fake(shapes.fake_activation_quantize)
