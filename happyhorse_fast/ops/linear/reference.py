"""The three `fp8_linear` products, and the activation of any product, in plain torch.

Shapes, layouts and rounding are those of docs/OPS.md, the order of float32 operations is the kernels'. Rows are
computed tile by tile, so no [N, F] float32 exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from happyhorse_fast import ambient
from happyhorse_fast.ops.linear.contract import (
    ACTIVATIONS,
    ActivationQuantize,
    Linear,
    LinearActivation,
    LinearResidual,
    Product,
    activation_scale,
)
from happyhorse_fast.ops.quantize import quantize_static, scaled_rows, widened
from happyhorse_fast.ops.runtime.operation import custom_op


def products(given: Product) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their product [rows, F] float32) of every row tile.

    bf16 products are rounded to bf16; products of codes are not, and are multiplied by x_scale, then weight_scale.
    """
    x, x_scale, weight_scale = given.x, given.x_scale, given.weight_scale
    expert, wide = -1, torch.empty(0, dtype=torch.float32)
    for e, first, end in given.row_tiles.tolist():
        if e != expert:
            expert, wide = e, widened(given.weight[e]).T
        rows = slice(first, end)
        codes = widened(x[rows])
        if x_scale is None or weight_scale is None:
            yield rows, (codes @ wide).bfloat16().float()
        else:
            yield rows, (codes @ wide).float() * x_scale.expand(len(x))[rows, None] * weight_scale[e]


@custom_op("fp8_linear_reference", Linear)
@ambient.independent
def fp8_linear(given: Linear) -> Tensor:
    """The product, [N, F] bf16."""
    y = given.empty()
    for rows, product in products(given):
        y[rows] = product.bfloat16()
    return y


@custom_op("fp8_linear_residual_reference", LinearResidual)
@ambient.independent
def fp8_linear_residual(given: LinearResidual) -> None:
    """Add the product to ``hidden`` [N, F] float32, in place."""
    for rows, product in products(given):
        given.hidden[rows] += product


@custom_op("fp8_linear_activation_reference", LinearActivation)
@ambient.independent
def fp8_linear_activation(given: LinearActivation) -> Tensor:
    """The activation of the product: bf16, or e4m3 codes of it by `activation_scale`."""
    return _activate(given, products(given))


@custom_op("activation_quantize_reference", ActivationQuantize)
@ambient.independent
def activation_quantize(given: ActivationQuantize) -> Tensor:
    """The activation of a product [N, F] that is there already: bf16, or float32 to be multiplied by its scales."""

    def parts() -> Iterator[tuple[slice, Tensor]]:
        for e, first, end in given.row_tiles.tolist():
            rows = slice(first, end)
            yield rows, scaled_rows(given.product, given.row_scale, given.column_scale, rows, e)

    return _activate(given, parts())


def _activate(given: LinearActivation | ActivationQuantize, parts: Iterator[tuple[slice, Tensor]]) -> Tensor:
    """The activation of (rows, their product float32 [rows, F]), [N, K']."""
    y = given.empty()
    function = ACTIVATIONS[given.activation][0]
    scale = torch.tensor([activation_scale(given.activation)], device=y.device)
    for rows, product in parts:
        activated = function(product)
        y[rows] = quantize_static(activated, scale) if given.fp8 else activated.bfloat16()
    return y
