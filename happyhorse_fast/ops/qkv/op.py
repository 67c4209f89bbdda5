"""RMSNorm with quantisation, and the QKV product with its epilogue: the two launches before attention.

docs/OPS.md states every tensor, layout and rounding point.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from happyhorse_fast.ops.qkv import cuda, reference
from happyhorse_fast.ops.qkv.contract import QKV, QkNormRope, QkvLinear, RmsnormQuantize
from happyhorse_fast.ops.runtime.checks import none_for_empty, require_backend


def rmsnorm_quantize(
    hidden: Tensor,
    norm_weight: Tensor,
    row_tiles: Tensor,
    branch: Tensor | None = None,
    out: str = "bf16",
    *,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Residual add, RMSNorm and cast in one pass over the residual stream.

    Args:
        hidden: [N, C] float32, rows contiguous; ``branch`` is added to it in place. C is at most 8192.
        norm_weight: [E, C] float32.
        row_tiles: [tiles, 3] int32 (expert, first row, end row).
        branch: [N, C] bf16, rows contiguous, or None.
        out: ``"bf16"``, or ``"int8"`` or ``"fp8"`` (e4m3) with a scale per row.
        backend: ``"triton"``, ``"cuda"`` (C a multiple of 4) or ``"reference"``.

    Returns:
        x [N, C] bf16 and a scale of size [0]; or x [N, C] int8 or e4m3 and its scale [N] float32.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape, device or layout; a backend or ``out`` there is not.
    """
    given = RmsnormQuantize(hidden, norm_weight, row_tiles, branch, out)
    given.check()
    x, scale = _implementation(backend, ("triton", "cuda", "reference")).rmsnorm_quantize(*given.values())
    return x, scale


def qkv_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    qk_norm: Tensor,
    cos_sin: Tensor,
    row_tiles: Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: Tensor | None = None,
    *,
    backend: str = "triton",
) -> QKV:
    """QKV product with scales, QK-norm, rotation, gate and quantisation in its epilogue.

    Args:
        x: [N, C] bf16, or int8 or e4m3 with ``x_scale``; rows contiguous.
        x_scale: [N] float32 where x is codes; else None, or empty as `rmsnorm_quantize` gives it.
        weight: [E, F, C] in the dtype of x, as `qkv.packing.pack_qkv_weight` makes it.
        weight_scale: [E, F] float32 where weight is codes, else None.
        qk_norm: [E, 2, D] float32, channels permuted like the weight's.
        cos_sin: [N, D] float32, from `qkv.packing.pack_cos_sin`.
        row_tiles: [tiles, 3] int32; every tile starts on a multiple of 128 unless ``out`` is ``"bf16"``.
        num_heads_q: Hq.
        num_heads_kv: Hkv; divides Hq.
        out: ``"bf16"``, ``"int8_qk"`` (v in bf16), ``"int8_qk_fp8_v"`` or ``"fp8"``.
        qk_scale: [E, 2] float32 where ``out`` is ``"fp8"``, else None.
        backend: ``"triton"``, ``"reference"``, or ``"cuda"``: a product of torch's library in chunks of rows of at most
            256 MB (in int8, whose sums are held in int32 and float32, 512), each followed by `qk_norm_rope`. With
            several experts the host then reads ``row_tiles`` once per tensor, which waits for the device and cannot
            happen in a CUDA graph's capture: call once before, with the same tensor. C is a multiple of 16 where x is
            codes, rows and their starts of 16 bytes.

    Returns:
        q [N, Hq, D], k [N, Hkv, D], v [N, Hkv, D] or in e4m3 transposed [Hkv, D, S * 128]; q_scale, k_scale and
        v_scale as `block_sparse_attention` takes them, of size [0] where it takes none; gate [N, Hq] float32.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape, device or layout, one that is missing or has no
            meaning here, or a backend there is not.
        RuntimeError: ``"cuda"`` in a capture with ``row_tiles`` of several experts that the host has not read.
    """
    x_scale, heads = none_for_empty(x, x_scale), (num_heads_q, num_heads_kv)
    given = QkvLinear(x, x_scale, weight, weight_scale, qk_norm, cos_sin, row_tiles, *heads, out, qk_scale)
    given.check()
    return cast(QKV, _implementation(backend, ("triton", "cuda", "reference")).qkv_linear(*given.values()))


def qk_norm_rope(
    product: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    qk_norm: Tensor,
    cos_sin: Tensor,
    row_tiles: Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: Tensor | None = None,
    *,
    backend: str = "cuda",
) -> QKV:
    """The epilogue of `qkv_linear` alone, for a product of another GEMM.

    Args:
        product: [N, F] bf16; or float32 sums of products of codes, to be multiplied by the two scales. Rows contiguous;
            columns as `qkv.packing.pack_qkv_weight` orders them.
        row_scale: [N] float32 where product is float32, else None.
        column_scale: [E, F] float32 where product is float32, else None.
        qk_norm: [E, 2, D] float32, channels permuted like the product's.
        cos_sin: [N, D] float32, from `qkv.packing.pack_cos_sin`.
        row_tiles: [tiles, 3] int32 on the device; every tile starts on a multiple of 128 unless ``out`` is
            ``"bf16"``.
        num_heads_q: Hq.
        num_heads_kv: Hkv; divides Hq.
        out: ``"bf16"``, ``"int8_qk"`` (v in bf16), ``"int8_qk_fp8_v"`` or ``"fp8"``.
        qk_scale: [E, 2] float32 where ``out`` is ``"fp8"``, else None.
        backend: ``"cuda"`` (tensors that start on 16 bytes, and rows of product too) or ``"reference"``.

    Returns:
        q, k, v, q_scale, k_scale, v_scale and gate, as `qkv_linear`.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape, device or layout, one that is missing or has no
            meaning here, or a backend there is not.
    """
    heads = num_heads_q, num_heads_kv
    given = QkNormRope(product, row_scale, column_scale, qk_norm, cos_sin, row_tiles, *heads, out, qk_scale)
    given.check()
    return cast(QKV, _implementation(backend, ("cuda", "reference")).qk_norm_rope(*given.values()))


def _implementation(backend: str, allowed: tuple[str, ...]) -> Any:
    """The module with a backend's ops; Triton's is imported when it is first called, nothing else here needs it."""
    require_backend(backend, allowed)
    if backend == "triton":
        from happyhorse_fast.ops.qkv import triton

        return triton
    return cuda if backend == "cuda" else reference
