"""`fp8_linear_activation` from a library's product and a CUDA kernel, as a torch.library op; `ops.fp8_linear` checks.

`fp8_linear` and `fp8_linear_residual` are not here: what they do to a product is too little for a kernel after it.
"""

from __future__ import annotations

import torch

from happyhorse_fast.ops import fp8_linear as shapes
from happyhorse_fast.ops.cuda.activation_quantize import finish_rows
from happyhorse_fast.ops.cuda.library_product import check_operands, library_product, scale_of_one
from happyhorse_fast.ops.cuda.row_spans import RowTiles, chunks, expert_spans
from happyhorse_fast.reference.fp8_linear import empty_activated


@torch.library.custom_op("happyhorse_fast::fp8_linear_activation_cuda", mutates_args=())
def fp8_linear_activation(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
) -> torch.Tensor:
    """See :func:`happyhorse_fast.ops.fp8_linear.fp8_linear_activation`."""
    check_operands(x, weight)
    if x_scale is not None:
        x_scale = x_scale.expand(x.shape[0]).contiguous()
    y = empty_activated(x.shape[0], weight.shape[1], activation, fp8, x.device)
    experts, features, _ = weight.shape
    spans = expert_spans(row_tiles, experts, x.shape[0], whole_tiles=False)
    one = scale_of_one(x)
    for expert, first, end in chunks(spans, features, 2 if x.dtype == shapes.BF16 else 4):
        product = library_product(x[first:end], weight[expert], one)
        rows = RowTiles(table=None, expert=expert, first=first, end=end)
        tiles = -(-(end - first) // shapes.ROW_TILE)
        finish_rows(product, x_scale, weight_scale, rows, tiles, activation, y)
    return y


fp8_linear_activation.register_fake(shapes.fake_fp8_linear_activation)
