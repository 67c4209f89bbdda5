"""Formats in which each backend has a kernel of an op, by the names that self-checks and dispatch share."""

from __future__ import annotations

QKV = {
    "bf16": ("bf16", "bf16"),
    "int8_qk": ("bf16", "int8_qk"),
    "int8_qk_fp8_v": ("bf16", "int8_qk_fp8_v"),
    "bf16_x_fp8": ("bf16", "fp8"),
    "int8_x": ("int8", "bf16"),
    "int8_x_int8_qk": ("int8", "int8_qk"),
    "int8_x_int8_qk_fp8_v": ("int8", "int8_qk_fp8_v"),
    "int8_x_fp8": ("int8", "fp8"),
    "fp8_x": ("fp8", "bf16"),
    "fp8_x_int8_qk": ("fp8", "int8_qk"),
    "fp8_x_int8_qk_fp8_v": ("fp8", "int8_qk_fp8_v"),
    "fp8": ("fp8", "fp8"),
}
"""Formats of `qkv_linear`: of its product, and of the q, k and v that it gives."""
ATTENTION_OUT = {
    "bf16": ("bf16", "bf16"),
    "int8_qk": ("int8_qk", "bf16"),
    "bf16_fp8_out": ("bf16", "fp8"),
    "int8_qk_fp8_out": ("int8_qk", "fp8"),
    "int8_qk_fp8_v": ("int8_qk_fp8_v", None),
    "fp8": ("fp8", None),
}
"""Formats of attention: its own, and its result's; None for both."""
ACTIVATION = {
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "bf16"),
    "bf16_fp8_out": ("bf16", "fp8"),
    "fp8_bf16_out": ("fp8", "bf16"),
    "fp8": ("fp8", "fp8"),
}
"""Formats of `fp8_linear_activation`: of its product, and of its result."""
TRITON: dict[str, tuple[str, ...]] = {
    "rmsnorm_quantize": ("bf16", "int8", "fp8"),
    "quantize_rows": ("int8",),
    "qkv_linear": tuple(QKV),
    "select_blocks": ("bf16", "int8_qk", "fp8"),
    "block_sparse_attention": tuple(ATTENTION_OUT),
    "fp8_linear": ("bf16", "int8", "fp8"),
    "fp8_linear_residual": ("bf16", "int8", "fp8"),
    "fp8_linear_activation": tuple(ACTIVATION),
}
CUDA = {op: TRITON[op] for op in ("rmsnorm_quantize", "qkv_linear", "select_blocks", "fp8_linear_activation")}
VARIANTS = {"triton": TRITON, "cuda": CUDA | {"block_sparse_attention": ("bf16", "bf16_fp8_out")}}
"""Formats in which a backend has a kernel of an op; an op that is not listed has none.

Attention's format need not be its neighbours', so two meet in :data:`QKV` and :data:`ATTENTION_OUT`; of the MLP's
products one may be skipped, so two meet in :data:`ACTIVATION`. Each is a kernel that no other format compiles.
"""


def qk_format(attention: str) -> str:
    """Format of q and k alone, by which `select_blocks` goes, in a format of attention."""
    return attention.removesuffix("_fp8_v")


def uses_e4m3(fmt: str) -> bool:
    """Whether a format has e4m3, which not every GPU has."""
    return "fp8" in fmt
