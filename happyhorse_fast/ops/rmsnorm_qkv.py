"""RMSNorm with quantisation, and the QKV product with its epilogue: arguments, results and choice of backend.

docs/OPS.md states every tensor, layout and rounding point. Nothing here needs Triton: its launchers are imported when
they are first called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from happyhorse_fast.ops.checks import require, require_backend
from happyhorse_fast.reference import quantized_qkv as reference
from happyhorse_fast.reference.quantized_qkv import NORMALISED, QKV, empty_normalised, empty_qkv

ROW_TILE = 128
HEAD_DIMS = (32, 64, 128)
MAX_CHANNELS = 8192
"""A program of `rmsnorm_quantize` holds a row in registers: 8192 float32 are 32 in each of 256 threads."""
OUTPUTS = ("bf16", "int8_qk", "fp8")
BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


def rmsnorm_quantize(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    row_tiles: torch.Tensor,
    branch: torch.Tensor | None = None,
    out: str = "bf16",
    *,
    backend: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
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
    device = hidden.device
    require("hidden", hidden, (torch.float32,), ("N", "C"), device=device, strided_rows=True)
    n, c = hidden.shape
    if c > MAX_CHANNELS:
        raise ValueError(f"hidden must have at most {MAX_CHANNELS} channels, got {c}")
    require("norm_weight", norm_weight, (torch.float32,), ("E", c), device=device)
    require("row_tiles", row_tiles, (torch.int32,), ("tiles", 3), device=device)
    if branch is not None:
        require("branch", branch, (BF16,), (n, c), device=device, strided_rows=True)
    if out not in NORMALISED:
        raise ValueError(f"out must be one of {', '.join(map(repr, NORMALISED))}; got {out!r}")
    launcher = _launcher(backend)
    op = _rmsnorm_quantize_reference if launcher is None else launcher.rmsnorm_quantize
    return op(hidden, norm_weight, row_tiles, branch, out)


def qkv_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    row_tiles: torch.Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: torch.Tensor | None = None,
    *,
    backend: str = "triton",
) -> QKV:
    """QKV product with scales, QK-norm, rotation, gate and quantisation in its epilogue.

    Args:
        x: [N, C] bf16, or int8 or e4m3 with ``x_scale``; rows contiguous.
        x_scale: [N] float32 where x is codes; else None, or empty as `rmsnorm_quantize` gives it.
        weight: [E, F, C] in the dtype of x, as `packing_qkv.pack_qkv_weight` makes it.
        weight_scale: [E, F] float32 where weight is codes, else None.
        qk_norm: [E, 2, D] float32, channels permuted like the weight's.
        cos_sin: [N, D] float32, from `packing_qkv.pack_cos_sin`.
        row_tiles: [tiles, 3] int32; every tile starts on a multiple of 128 unless ``out`` is ``"bf16"``.
        num_heads_q: Hq.
        num_heads_kv: Hkv; divides Hq.
        out: ``"bf16"``, ``"int8_qk"`` (v in bf16) or ``"fp8"``.
        qk_scale: [E, 2] float32 where ``out`` is ``"fp8"``, else None.
        backend: ``"triton"``, ``"reference"``, or ``"cuda"``: a product of torch's library in chunks of rows of at most
            256 MB (in int8, whose sums are held in int32 and float32, 512), each followed by `qk_norm_rope`. With
            several experts the host then reads ``row_tiles`` once per tensor, which waits for the device and cannot
            happen in a CUDA graph's capture: call once before, with the same tensor. C is a multiple of 16 where x is
            codes, rows and their starts of 16 bytes.

    Returns:
        q [N, Hq, D], k [N, Hkv, D], v [N, Hkv, D] or in fp8 transposed [Hkv, D, S * 128]; q_scale, k_scale and
        v_scale as `block_sparse_attention` takes them, of size [0] where it takes none; gate [N, Hq] float32.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape, device or layout, one that is missing or has no
            meaning here, or a backend there is not.
        RuntimeError: ``"cuda"`` in a capture with ``row_tiles`` of several experts that the host has not read.
    """
    device = x.device
    require("x", x, (BF16, INT8, E4M3), ("N", "C"), device=device, strided_rows=True)
    n, c = x.shape
    d = check_heads(cos_sin, n, num_heads_q, num_heads_kv, device)
    require("weight", weight, (x.dtype,), ("E", features_of(num_heads_q, num_heads_kv, d), c), device=device)
    experts = weight.shape[0]
    require("qk_norm", qk_norm, (torch.float32,), (experts, 2, d), device=device)
    require("row_tiles", row_tiles, (torch.int32,), ("tiles", 3), device=device)
    if x.dtype != BF16:
        require("x_scale", x_scale, (torch.float32,), (n,), device=device)
        require("weight_scale", weight_scale, (torch.float32,), weight.shape[:2], device=device)
    else:
        if x_scale is not None and x_scale.numel():
            raise ValueError(f"x_scale must be None or empty where x is bf16, got shape {list(x_scale.shape)}")
        if weight_scale is not None:
            raise ValueError(f"weight_scale must be None where weight is bf16, got shape {list(weight_scale.shape)}")
        x_scale = None
    check_outputs(out, qk_scale, experts, device)
    launcher = _launcher(backend)
    op = _qkv_linear_reference if launcher is None else launcher.qkv_linear
    return op(x, x_scale, weight, weight_scale, qk_norm, cos_sin, row_tiles, num_heads_q, num_heads_kv, out, qk_scale)


def features_of(num_heads_q: int, num_heads_kv: int, head_dim: int) -> int:
    """F, columns of the packed product: q, k, v, and the gates up to a whole head."""
    return (num_heads_q + 2 * num_heads_kv + -(-num_heads_q // head_dim)) * head_dim


def check_heads(cos_sin: torch.Tensor, n: int, num_heads_q: int, num_heads_kv: int, device: torch.device) -> int:
    """Hold the heads and their rotation against the contract; the head dim."""
    require("cos_sin", cos_sin, (torch.float32,), (n, "D"), device=device)
    d = cos_sin.shape[1]
    if d not in HEAD_DIMS:
        raise ValueError(f"cos_sin must have D = 32, 64 or 128 columns (the head dim), got {d}")
    if num_heads_kv < 1 or num_heads_q < 1 or num_heads_q % num_heads_kv:
        raise ValueError(f"num_heads_q must be a multiple of num_heads_kv, got {num_heads_q} and {num_heads_kv}")
    return d


def check_outputs(
    out: str,
    qk_scale: torch.Tensor | None,
    experts: int,
    device: torch.device,
) -> None:
    """Hold what decides how q, k and v are written against the contract."""
    if out not in OUTPUTS:
        raise ValueError(f"out must be one of {', '.join(map(repr, OUTPUTS))}; got {out!r}")
    if out == "fp8":
        require("qk_scale", qk_scale, (torch.float32,), (experts, 2), device=device)
    elif qk_scale is not None:
        raise ValueError(f'qk_scale must be None where out is "{out}", got shape {list(qk_scale.shape)}')


def _launcher(backend: str) -> Any:
    """The module with a backend's kernels; None for the reference."""
    require_backend(backend, ("triton", "cuda", "reference"))
    if backend == "triton":
        from happyhorse_fast.ops.triton import rmsnorm_qkv as triton_launcher

        return triton_launcher
    if backend == "cuda":
        from happyhorse_fast.ops.cuda import rmsnorm_qkv as cuda_launcher

        return cuda_launcher
    return None


# The reference walks row_tiles on the host; as ops of their own they trace and export without a look inside.
_rmsnorm_quantize_reference = torch.library.custom_op(
    "happyhorse_fast::rmsnorm_quantize_reference", reference.rmsnorm_quantize, mutates_args=("hidden",)
)
_qkv_linear_reference = torch.library.custom_op(
    "happyhorse_fast::qkv_linear_reference", reference.qkv_linear, mutates_args=()
)


@_rmsnorm_quantize_reference.register_fake
def fake_rmsnorm_quantize(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    row_tiles: torch.Tensor,
    branch: torch.Tensor | None = None,
    out: str = "bf16",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of `rmsnorm_quantize`, for every backend."""
    return empty_normalised(hidden, out)


@_qkv_linear_reference.register_fake
def fake_qkv_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    row_tiles: torch.Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: torch.Tensor | None = None,
) -> QKV:
    """Shapes of `qkv_linear`, for every backend."""
    return empty_qkv(cos_sin, num_heads_q, num_heads_kv, out)


if not TYPE_CHECKING:  # a checker would take every name to be there

    def __getattr__(name: str) -> Any:
        if name == "rmsnorm_qkv":
            # No AttributeError: `from ... import` would put words of its own in the place of these.
            raise ImportError(
                "rmsnorm_qkv is gone: call rmsnorm_quantize, then qkv_linear; one kernel for both took 19.2 ms on an "
                "H200, the two take 8.6"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
