"""The activation of a product as a CUDA kernel, alone and behind products of torch's library.

`fp8_linear` and `fp8_linear_residual` are not here: what they do to a product is too little for a kernel after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from happyhorse_fast.kernels.launch import ROW_TILE
from happyhorse_fast.ops.linear.contract import ActivationQuantize, LinearActivation, activation_scale
from happyhorse_fast.ops.runtime.cuda.launch import launch
from happyhorse_fast.ops.runtime.cuda.library_product import RowTiles, products
from happyhorse_fast.ops.runtime.cuda.parameters import Parameters, address, require_vectors, struct
from happyhorse_fast.ops.runtime.operation import custom_op

# Of csrc/device/activation_quantize.cu.
THREADS, ROWS_PER_BLOCK, VECTOR_BYTES = 256, 16, 16
ActivationQuantizeParams = struct("ActivationQuantizeParams", "activation_quantize.cu", RowTiles=RowTiles)


@custom_op("activation_quantize_cuda", ActivationQuantize)
def activation_quantize(given: ActivationQuantize) -> Tensor:
    """Launch the kernel on all rows."""
    y = given.empty()
    finish_rows(given, RowTiles(table=address(given.row_tiles)), given.row_tiles.shape[0], y)
    return y


@custom_op("fp8_linear_activation_cuda", LinearActivation)
def fp8_linear_activation(given: LinearActivation) -> Tensor:
    """A product of torch's library in chunks of rows, each followed by the kernel."""
    x_scale, y = given.x_scale, given.empty()
    if x_scale is not None:
        x_scale = x_scale.expand(given.x.shape[0]).contiguous()
    for product, rows, tiles in products(given.x, given.weight, given.row_tiles, whole_tiles=False):
        epilogue = ActivationQuantize(
            product, x_scale, given.weight_scale, given.row_tiles, given.activation, given.fp8
        )
        finish_rows(epilogue, rows, tiles, y)
    return y


def finish_rows(given: ActivationQuantize, rows: Parameters, tiles: int, y: Tensor) -> None:
    """Write the activation of a product to those rows of ``y`` that ``rows`` names, in ``tiles`` row tiles.

    The product starts with row ``rows.first``; everything else has all rows and experts.

    Raises:
        ValueError: Rows or addresses are not what 16-byte loads need.
    """
    product = given.product
    values = VECTOR_BYTES // product.element_size()
    require_vectors(values, product=product)
    require_vectors(VECTOR_BYTES // 4, column_scale=given.column_scale)
    features = product.shape[1]
    params = ActivationQuantizeParams.of(
        given,
        y=y,
        rows=rows,
        product_stride=product.stride(0),
        features=features,
        gated=given.activation == "swiglu7",
        inverse_scale=1.0 / activation_scale(given.activation) if y.dtype == torch.float8_e4m3fn else 0.0,
    )
    grid = (-(-features // (THREADS * values)), tiles, ROW_TILE // ROWS_PER_BLOCK)
    launch("activation_quantize", "activation_quantize", params, grid, THREADS, 0, product)
