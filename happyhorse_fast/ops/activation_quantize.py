"""SwiGLU7 or GELU7 and quantisation of a product that another GEMM made: the epilogue of `fp8_linear_activation`.

For users with a GEMM of their own; docs/OPS.md states every tensor, layout and rounding point.
"""

from __future__ import annotations

import torch

from happyhorse_fast.ops.checks import require, require_backend
from happyhorse_fast.ops.fp8_linear import BF16, check_activation, static_scale
from happyhorse_fast.ops.qk_norm_rope import check_product_scales
from happyhorse_fast.reference import fp8_linear as reference
from happyhorse_fast.reference.fp8_linear import empty_activated


def activation_quantize(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
    *,
    backend: str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `fp8_linear_activation` makes of its product, of one that is there already.

    Args:
        product: [N, F] bf16; or float32 sums of products of codes, to be multiplied by the two scales. Rows contiguous;
            F is a multiple of 128.
        row_scale: [N] float32 where product is float32, else None.
        column_scale: [E, F] float32 where product is float32, else None.
        row_tiles: [tiles, 3] int32 (expert, first row, end row) on the device.
        activation: ``"swiglu7"`` (F = 2K', gate and linear interleaved) or ``"gelu7"`` (F = K').
        fp8: Whether the result is e4m3, rather than bf16.
        backend: ``"cuda"`` (tensors that start on 16 bytes, and rows of product too) or ``"reference"``.

    Returns:
        y [N, K'] bf16 and a scale of size [0]; or y e4m3 and its static scale [1], as `fp8_linear_activation`.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape, device or layout, one that is missing or has no
            meaning here, or a backend or an activation there is not.
    """
    device = product.device
    require("product", product, (BF16, torch.float32), ("N", "F"), device=device, strided_rows=True)
    require("row_tiles", row_tiles, (torch.int32,), ("tiles", 3), device=device)
    check_product_scales(product, row_scale, column_scale, "E")
    check_activation(activation, "product", product.shape[1])
    require_backend(backend, ("cuda", "reference"))
    op = _reference
    if backend == "cuda":
        from happyhorse_fast.ops.cuda import activation_quantize as launcher

        op = launcher.activation_quantize
    y = op(product, row_scale, column_scale, row_tiles, activation, fp8)
    return y, static_scale(activation, fp8, device)


# The reference walks row_tiles on the host; as an op of its own it traces and exports without a look inside.
_reference = torch.library.custom_op(
    "happyhorse_fast::activation_quantize_reference", reference.activation_quantize, mutates_args=()
)


@_reference.register_fake
def fake_activation_quantize(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
) -> torch.Tensor:
    """Shape of `activation_quantize`'s y, for both backends."""
    return empty_activated(product.shape[0], product.shape[1], activation, fp8, product.device)
