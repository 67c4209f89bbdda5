"""The ops of docs/OPS.md, imported on first use; none needs Triton before it is called with backend "triton"."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from happyhorse_fast.ops.attention.op import block_sparse_attention
    from happyhorse_fast.ops.attention.score_bound import norm_bound
    from happyhorse_fast.ops.block_selection.op import select_blocks
    from happyhorse_fast.ops.linear.op import (
        activation_quantize,
        fp8_linear,
        fp8_linear_activation,
        fp8_linear_residual,
    )
    from happyhorse_fast.ops.linear.packing import pack_linear, unpack_linear
    from happyhorse_fast.ops.qkv.op import qk_norm_rope, qkv_linear, rmsnorm_quantize
    from happyhorse_fast.ops.qkv.packing import (
        pack_cos_sin,
        pack_qk_norm,
        pack_qkv_weight,
        static_qk_scale,
        unpack_cos_sin,
        unpack_qk_norm,
        unpack_qkv_weight,
    )
    from happyhorse_fast.ops.row_quantization.op import quantize_rows
    from happyhorse_fast.ops.runtime.row_tiles import check_row_tiles

_WHERE = {
    "activation_quantize": "linear.op",
    "block_sparse_attention": "attention.op",
    "check_row_tiles": "runtime.row_tiles",
    "fp8_linear": "linear.op",
    "fp8_linear_activation": "linear.op",
    "fp8_linear_residual": "linear.op",
    "norm_bound": "attention.score_bound",
    "pack_cos_sin": "qkv.packing",
    "pack_linear": "linear.packing",
    "pack_qk_norm": "qkv.packing",
    "pack_qkv_weight": "qkv.packing",
    "qk_norm_rope": "qkv.op",
    "qkv_linear": "qkv.op",
    "quantize_rows": "row_quantization.op",
    "rmsnorm_quantize": "qkv.op",
    "select_blocks": "block_selection.op",
    "static_qk_scale": "qkv.packing",
    "unpack_cos_sin": "qkv.packing",
    "unpack_linear": "linear.packing",
    "unpack_qk_norm": "qkv.packing",
    "unpack_qkv_weight": "qkv.packing",
}

__all__ = [
    "activation_quantize",
    "block_sparse_attention",
    "check_row_tiles",
    "fp8_linear",
    "fp8_linear_activation",
    "fp8_linear_residual",
    "norm_bound",
    "pack_cos_sin",
    "pack_linear",
    "pack_qk_norm",
    "pack_qkv_weight",
    "qk_norm_rope",
    "qkv_linear",
    "quantize_rows",
    "rmsnorm_quantize",
    "select_blocks",
    "static_qk_scale",
    "unpack_cos_sin",
    "unpack_linear",
    "unpack_qk_norm",
    "unpack_qkv_weight",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
