"""The ops of docs/OPS.md, imported on first use; none needs Triton before it is called with backend "triton"."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from happyhorse_fast.ops.attention.op import block_sparse_attention as block_sparse_attention
    from happyhorse_fast.ops.attention.score_bound import norm_bound as norm_bound
    from happyhorse_fast.ops.block_selection.op import select_blocks as select_blocks
    from happyhorse_fast.ops.linear.op import activation_quantize as activation_quantize
    from happyhorse_fast.ops.linear.op import fp8_linear as fp8_linear
    from happyhorse_fast.ops.linear.op import fp8_linear_activation as fp8_linear_activation
    from happyhorse_fast.ops.linear.op import fp8_linear_residual as fp8_linear_residual
    from happyhorse_fast.ops.linear.packing import pack_linear as pack_linear
    from happyhorse_fast.ops.qkv.op import qk_norm_rope as qk_norm_rope
    from happyhorse_fast.ops.qkv.op import qkv_linear as qkv_linear
    from happyhorse_fast.ops.qkv.op import rmsnorm_quantize as rmsnorm_quantize
    from happyhorse_fast.ops.qkv.packing import pack_cos_sin as pack_cos_sin
    from happyhorse_fast.ops.qkv.packing import pack_qk_norm as pack_qk_norm
    from happyhorse_fast.ops.qkv.packing import pack_qkv_weight as pack_qkv_weight
    from happyhorse_fast.ops.qkv.packing import static_qk_scale as static_qk_scale
    from happyhorse_fast.ops.row_quantization.op import quantize_rows as quantize_rows
    from happyhorse_fast.ops.runtime.row_tiles import check_row_tiles as check_row_tiles

_MODULES = {
    "attention.op": "block_sparse_attention",
    "attention.score_bound": "norm_bound",
    "block_selection.op": "select_blocks",
    "linear.op": "activation_quantize fp8_linear fp8_linear_activation fp8_linear_residual",
    "linear.packing": "pack_linear",
    "qkv.op": "qk_norm_rope qkv_linear rmsnorm_quantize",
    "qkv.packing": "pack_cos_sin pack_qk_norm pack_qkv_weight static_qk_scale",
    "row_quantization.op": "quantize_rows",
    "runtime.row_tiles": "check_row_tiles",
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
