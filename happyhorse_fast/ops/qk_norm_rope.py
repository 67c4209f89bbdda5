"""QK-norm, rotation, gate and quantisation of a qkv product that another GEMM made: the epilogue of `qkv_linear`.

For users with a GEMM of their own; docs/OPS.md states every tensor, layout and rounding point.
"""

from __future__ import annotations

import torch

from happyhorse_fast.ops.checks import require, require_backend
from happyhorse_fast.ops.rmsnorm_qkv import BF16, check_heads, check_outputs, features_of
from happyhorse_fast.reference import quantized_qkv as reference
from happyhorse_fast.reference.quantized_qkv import QKV, empty_qkv


def qk_norm_rope(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    row_tiles: torch.Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: torch.Tensor | None = None,
    *,
    backend: str = "cuda",
) -> QKV:
    """What `qkv_linear` makes of its product, of one that is there already.

    Args:
        product: [N, F] bf16; or float32 sums of products of codes, to be multiplied by the two scales. Rows contiguous;
            columns as `packing_qkv.pack_qkv_weight` orders them.
        row_scale: [N] float32 where product is float32, else None.
        column_scale: [E, F] float32 where product is float32, else None.
        qk_norm: [E, 2, D] float32, channels permuted like the product's.
        cos_sin: [N, D] float32, from `packing_qkv.pack_cos_sin`.
        row_tiles: [tiles, 3] int32 on the device; every tile starts on a multiple of 128 unless ``out`` is
            ``"bf16"``.
        num_heads_q: Hq.
        num_heads_kv: Hkv; divides Hq.
        out: ``"bf16"``, ``"int8_qk"`` (v in bf16) or ``"fp8"``.
        qk_scale: [E, 2] float32 where ``out`` is ``"fp8"``, else None.
        backend: ``"cuda"`` (tensors that start on 16 bytes, and rows of product too) or ``"reference"``.

    Returns:
        q, k, v, q_scale, k_scale, v_scale and gate, as `qkv_linear`.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape, device or layout, one that is missing or has no
            meaning here, or a backend there is not.
    """
    device = product.device
    require("product", product, (BF16, torch.float32), ("N", "F"), device=device, strided_rows=True)
    n = product.shape[0]
    d = check_heads(cos_sin, n, num_heads_q, num_heads_kv, device)
    require("product", product, (product.dtype,), (n, features_of(num_heads_q, num_heads_kv, d)), device=device,
            strided_rows=True)  # fmt: skip
    require("qk_norm", qk_norm, (torch.float32,), ("E", 2, d), device=device)
    experts = qk_norm.shape[0]
    require("row_tiles", row_tiles, (torch.int32,), ("tiles", 3), device=device)
    check_product_scales(product, row_scale, column_scale, experts)
    check_outputs(out, qk_scale, experts, device)
    require_backend(backend, ("cuda", "reference"))
    op = _reference
    if backend == "cuda":
        from happyhorse_fast.ops.cuda import qk_norm_rope as launcher

        op = launcher.qk_norm_rope
    return op(
        product,
        row_scale,
        column_scale,
        qk_norm,
        cos_sin,
        row_tiles,
        num_heads_q,
        num_heads_kv,
        out,
        qk_scale,
    )


def check_product_scales(
    product: torch.Tensor, row_scale: torch.Tensor | None, column_scale: torch.Tensor | None, experts: int | str
) -> None:
    """Hold the scales of a product [N, F] against its dtype: both where it is float32, none where it is bf16."""
    if product.dtype == BF16:
        for name, scale in (("row_scale", row_scale), ("column_scale", column_scale)):
            if scale is not None:
                raise ValueError(f"{name} must be None where product is bf16, got shape {list(scale.shape)}")
        return
    n, features = product.shape
    require("row_scale", row_scale, (torch.float32,), (n,), device=product.device)
    require("column_scale", column_scale, (torch.float32,), (experts, features), device=product.device)


# The reference walks row_tiles on the host; as an op of its own it traces and exports without a look inside.
_reference = torch.library.custom_op("happyhorse_fast::qk_norm_rope_reference", reference.qk_norm_rope, mutates_args=())


@_reference.register_fake
def fake_qk_norm_rope(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    row_tiles: torch.Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: torch.Tensor | None = None,
) -> QKV:
    """Shapes of `qk_norm_rope`, for both backends."""
    return empty_qkv(cos_sin, num_heads_q, num_heads_kv, out)
