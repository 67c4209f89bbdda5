"""The three `fp8_linear` products, and the activation of any product, in plain torch.

Shapes, layouts and rounding are those of docs/OPS.md, the order of float32 operations is the kernels'. Rows are
computed tile by tile, so no [N, F] float32 exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from happyhorse_fast.ops.linear.contract import (
    ACTIVATIONS,
    ActivationQuantize,
    Linear,
    LinearActivation,
    LinearResidual,
    Product,
    activation_scale,
)
from happyhorse_fast.ops.quantize import products, quantize_static, scaled_products
from happyhorse_fast.ops.runtime.operation import reference_op


def of_tiles(given: Product) -> Iterator[tuple[int, slice, Tensor]]:
    """(expert, rows, their product [rows, F] float32) of every row tile."""
    return products(given.x, given.x_scale, given.weight, given.weight_scale, given.row_tiles.tolist())


@reference_op(Linear)
def fp8_linear(given: Linear) -> Tensor:
    """The product, [N, F] bf16."""
    y = given.empty()
    for _, rows, product in of_tiles(given):
        y[rows] = product.bfloat16()
    return y


@reference_op(LinearResidual)
def fp8_linear_residual(given: LinearResidual) -> None:
    """Add the product to ``hidden`` [N, F] float32, in place."""
    for _, rows, product in of_tiles(given):
        given.hidden[rows] += product


@reference_op(LinearActivation)
def fp8_linear_activation(given: LinearActivation) -> Tensor:
    """The activation of the product: bf16, or e4m3 codes of it by `activation_scale`."""
    return _activate(given, of_tiles(given))


@reference_op(ActivationQuantize)
def activation_quantize(given: ActivationQuantize) -> Tensor:
    """The activation of a product [N, F] that is there already: bf16, or float32 to be multiplied by its scales."""
    spans = given.row_tiles.tolist()
    return _activate(given, scaled_products(given.product, given.row_scale, given.column_scale, spans))


def _activate(given: LinearActivation | ActivationQuantize, parts: Iterator[tuple[int, slice, Tensor]]) -> Tensor:
    """The activation of (expert, rows, their product float32 [rows, F]), [N, K']."""
    y = given.empty()
    function = ACTIVATIONS[given.activation][0]
    scale = torch.tensor([activation_scale(given.activation)], device=y.device)
    for _, rows, product in parts:
        activated = function(product)
        y[rows] = quantize_static(activated, scale) if given.fp8 else activated.bfloat16()
    return y
