"""The three `fp8_linear` products, and the activation of any product, in plain torch.

Shapes, layouts and rounding are those of docs/OPS.md, the order of float32 operations is the kernels'. Rows are
computed tile by tile, so no [N, F] float32 exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from happyhorse_fast import ambient
from happyhorse_fast.reference.mlp import LIMIT, gelu7, swiglu7
from happyhorse_fast.reference.quantize import E4M3_MAX, quantize_static, scaled_rows, widened

ACTIVATIONS = {"swiglu7": (swiglu7, 2, LIMIT * (LIMIT + 1)), "gelu7": (gelu7, 1, LIMIT)}
"""Name -> (function, columns of the product per output, bound of its outputs)."""


def empty_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Result of `fp8_linear`, not yet written: [N, F] bf16."""
    return torch.empty((x.shape[0], weight.shape[1]), dtype=torch.bfloat16, device=x.device)


def empty_activated(rows: int, features: int, activation: str, fp8: bool, device: torch.device) -> torch.Tensor:
    """The activation of a product [rows, features], not yet written: [rows, K']."""
    columns = features // ACTIVATIONS[activation][1]
    return torch.empty((rows, columns), dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16, device=device)


def activation_scale(activation: str) -> float:
    """Scale of an activation's e4m3 codes: its bound / 448, 0.125 of swiglu7 and 1/64 of gelu7.

    Both are powers of two, so that y / scale is exact, and so is y * (1 / scale).
    """
    return ACTIVATIONS[activation][2] / E4M3_MAX


def products(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their product [rows, F] float32) of every row tile.

    bf16 products are rounded to bf16; products of codes are not, and are multiplied by x_scale, then weight_scale.
    """
    expert, wide = -1, torch.empty(0, dtype=torch.float32)
    for e, first, end in row_tiles.tolist():
        if e != expert:
            expert, wide = e, widened(weight[e]).T
        rows = slice(first, end)
        codes = widened(x[rows])
        if x_scale is None or weight_scale is None:
            yield rows, (codes @ wide).bfloat16().float()
        else:
            yield rows, (codes @ wide).float() * x_scale.expand(len(x))[rows, None] * weight_scale[e]


@ambient.independent
def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
) -> torch.Tensor:
    """The product, [N, F] bf16."""
    y = empty_product(x, weight)
    for rows, product in products(x, x_scale, weight, weight_scale, row_tiles):
        y[rows] = product.bfloat16()
    return y


@ambient.independent
def fp8_linear_residual(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    hidden: torch.Tensor,
) -> None:
    """Add the product to ``hidden`` [N, F] float32, in place."""
    for rows, product in products(x, x_scale, weight, weight_scale, row_tiles):
        hidden[rows] += product


@ambient.independent
def fp8_linear_activation(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
) -> torch.Tensor:
    """The activation of the product: bf16, or e4m3 codes of it by `activation_scale`."""
    parts = products(x, x_scale, weight, weight_scale, row_tiles)
    return _activate(parts, x.shape[0], weight.shape[1], activation, fp8, x.device)


@ambient.independent
def activation_quantize(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
) -> torch.Tensor:
    """The activation of a product [N, F] that is there already: bf16, or float32 to be multiplied by its scales."""

    def parts() -> Iterator[tuple[slice, torch.Tensor]]:
        for e, first, end in row_tiles.tolist():
            rows = slice(first, end)
            yield rows, scaled_rows(product, row_scale, column_scale, rows, e)

    return _activate(parts(), product.shape[0], product.shape[1], activation, fp8, product.device)


def _activate(
    parts: Iterator[tuple[slice, torch.Tensor]], n: int, features: int, activation: str, fp8: bool, device: torch.device
) -> torch.Tensor:
    """The activation of (rows, their product float32 [rows, features]), written to [n, columns]."""
    function = ACTIVATIONS[activation][0]
    scale = torch.tensor([activation_scale(activation)], device=device)
    y = empty_activated(n, features, activation, fp8, device)
    for rows, product in parts:
        activated = function(product)
        y[rows] = quantize_static(activated, scale) if fp8 else activated.bfloat16()
    return y
