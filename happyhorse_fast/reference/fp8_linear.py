"""The three `fp8_linear` products in plain torch, with the kernels' rounding points and order of float32 operations.

Shapes, layouts and rounding are those of docs/OPS.md. Rows are computed tile by tile, so no [N, F] float32 exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from happyhorse_fast.reference.mlp import gelu7, swiglu7
from happyhorse_fast.reference.quantize import quantize_groups

ACTIVATIONS = {"swiglu7": (swiglu7, 2, 64), "gelu7": (gelu7, 1, 128)}
"""Name -> (function, columns of the product per output, outputs that share a scale)."""


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
    expert, wide = -1, torch.empty(0)
    for e, first, end in row_tiles.tolist():
        if e != expert:
            expert, wide = e, weight[e].float().T
        rows = slice(first, end)
        codes = x[rows].float()
        if x_scale is None or weight_scale is None:
            yield rows, (codes @ wide).bfloat16().float()
        elif x_scale.dim() == 1:
            yield rows, (codes @ wide) * x_scale[rows, None] * weight_scale[e]
        else:
            group = x.shape[1] // x_scale.shape[1]
            product = torch.zeros(len(codes), wide.shape[1], device=x.device)
            for g in range(x_scale.shape[1]):
                part = slice(g * group, (g + 1) * group)
                product += (codes[:, part] @ wide[part]) * x_scale[rows, g, None]
            yield rows, product * weight_scale[e]


def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
) -> torch.Tensor:
    """The product, [N, F] bf16."""
    y = torch.empty(x.shape[0], weight.shape[1], dtype=torch.bfloat16, device=x.device)
    for rows, product in products(x, x_scale, weight, weight_scale, row_tiles):
        y[rows] = product.bfloat16()
    return y


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


def fp8_linear_activation(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of the product: bf16 and a scale of size [0], or e4m3 codes and their scales per row and group."""
    function, per, group = ACTIVATIONS[activation]
    columns = weight.shape[1] // per
    y = torch.empty(x.shape[0], columns, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16, device=x.device)
    y_scale = torch.empty((x.shape[0], columns // group) if fp8 else 0, device=x.device)
    for rows, product in products(x, x_scale, weight, weight_scale, row_tiles):
        activated = function(product)
        if fp8:
            y[rows], y_scale[rows] = quantize_groups(activated, group)
        else:
            y[rows] = activated.bfloat16()
    return y, y_scale
