"""The linear layers with their epilogues: arguments, results and choice of backend.

docs/OPS.md states every tensor, layout and rounding point. Nothing here needs Triton: its launchers are imported when
they are first called.
"""

from __future__ import annotations

from typing import Any

import torch

from happyhorse_fast.ops.checks import require, require_backend
from happyhorse_fast.reference import fp8_linear as reference
from happyhorse_fast.reference.fp8_linear import activation_scale, empty_activated, empty_product

ROW_TILE = 128
BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    *,
    backend: str = "triton",
) -> torch.Tensor:
    """x . weight of each row's expert, accumulated in float32 and rounded to bf16 once.

    Args:
        x: [N, K] bf16, int8 or e4m3.
        x_scale: float32, [N] (one per row) or [1] (one for all) where x is codes; else None or of size [0].
        weight: [E, F, K] in the dtype of x.
        weight_scale: [E, F] float32 where weight is codes, else None.
        row_tiles: [tiles, 3] int32 (expert, first row, end row): at most 128 rows each, every row once.
        backend: ``"triton"`` or ``"reference"``.

    Returns:
        [N, F] bf16.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape, device or layout, one that is missing or has no
            meaning here, or a backend there is not.
    """
    x_scale = _check(x, x_scale, weight, weight_scale, row_tiles)
    launcher = _launcher(backend, ("triton", "reference"))
    op = _reference if launcher is None else launcher.fp8_linear
    return op(x, x_scale, weight, weight_scale, row_tiles)


def fp8_linear_residual(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    hidden: torch.Tensor,
    *,
    backend: str = "triton",
) -> None:
    """hidden += x . weight, in place; the product is rounded to bf16 first where x is bf16.

    On sm_90 and sm_100, in int8 on sm_90 alone, the memory adds where hidden, x and weight start on 16 bytes with rows
    of a multiple of 16; else the kernel loads, adds and stores. docs/OPS.md says what differs.

    Args:
        x: As in :func:`fp8_linear`.
        x_scale: As in :func:`fp8_linear`.
        weight: As in :func:`fp8_linear`.
        weight_scale: As in :func:`fp8_linear`.
        row_tiles: As in :func:`fp8_linear`.
        hidden: [N, F] float32.
        backend: ``"triton"`` or ``"reference"``.

    Raises:
        TypeError, ValueError: As in :func:`fp8_linear`.
    """
    x_scale = _check(x, x_scale, weight, weight_scale, row_tiles)
    require("hidden", hidden, (torch.float32,), (x.shape[0], weight.shape[1]), device=x.device)
    launcher = _launcher(backend, ("triton", "reference"))
    op = _residual_reference if launcher is None else launcher.fp8_linear_residual
    op(x, x_scale, weight, weight_scale, row_tiles, hidden)


def fp8_linear_activation(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
    *,
    backend: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
    """activation(x . weight), and its codes and scales for the next product.

    Args:
        x: As in :func:`fp8_linear`.
        x_scale: As in :func:`fp8_linear`.
        weight: As in :func:`fp8_linear`; F is a multiple of 128.
        weight_scale: As in :func:`fp8_linear`.
        row_tiles: As in :func:`fp8_linear`.
        activation: ``"swiglu7"`` (F = 2K', gate and linear interleaved) or ``"gelu7"`` (F = K').
        fp8: Whether the result is e4m3, rather than bf16, whichever of the two x is; of int8 it is bf16, which
            `quantize_rows` takes.
        backend: ``"triton"``, ``"reference"``, or ``"cuda"``: a product of torch's library in chunks of rows of at most
            256 MB (in int8, whose sums are held in int32 and float32, 512), each followed by `activation_quantize`.
            With several experts the host then reads ``row_tiles`` once per tensor, which waits for the device and
            cannot happen in a CUDA graph's capture: call once before, with the same tensor. Where x is codes, K is a
            multiple of 16.

    Returns:
        y [N, K'] bf16 and a scale of size [0]; or y e4m3 and its scale [1] float32, which is static: 56 / 448 of
        swiglu7 and 7 / 448 of gelu7, whose outputs are bounded by 56 and 7.

    Raises:
        TypeError, ValueError: As in :func:`fp8_linear`, or an activation there is not.
        RuntimeError: ``"cuda"`` in a capture with ``row_tiles`` of several experts that the host has not read.
    """
    x_scale = _check(x, x_scale, weight, weight_scale, row_tiles)
    check_activation(activation, "weight", weight.shape[1])
    if fp8 and x.dtype == INT8:
        raise ValueError("fp8 must be False where x is int8: the result is bf16, for quantize_rows")
    launcher = _launcher(backend, ("triton", "cuda", "reference"))
    op = _activation_reference if launcher is None else launcher.fp8_linear_activation
    y = op(x, x_scale, weight, weight_scale, row_tiles, activation, fp8)
    return y, static_scale(activation, fp8, x.device)


def static_scale(activation: str, fp8: bool, device: torch.device) -> torch.Tensor:
    """Scale that an activation's result comes with: float32 [1], or [0] of a bf16 one."""
    if not fp8:
        return torch.empty(0, dtype=torch.float32, device=device)
    return torch.full((1,), activation_scale(activation), dtype=torch.float32, device=device)


def check_activation(activation: str, name: str, features: int) -> None:
    """Hold an activation, and the columns that argument ``name`` gives it, against the contract."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, reference.ACTIVATIONS))}; got {activation!r}")
    if features % ROW_TILE:
        raise ValueError(f"{name} must have a multiple of 128 features F before an activation, got {features}")


def _check(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
) -> torch.Tensor | None:
    """Hold the common arguments against the contract; the x_scale to go on with."""
    device = x.device
    require("x", x, (BF16, INT8, E4M3), ("N", "K"), device=device)
    n, k = x.shape
    require("weight", weight, (x.dtype,), ("E", "F", k), device=device)
    require("row_tiles", row_tiles, (torch.int32,), ("tiles", 3), device=device)
    if x.dtype == BF16:
        for name, scale in (("x_scale", x_scale), ("weight_scale", weight_scale)):
            if scale is not None and scale.numel():
                raise ValueError(f"{name} must be None or empty where x is bf16, got shape {list(scale.shape)}")
        return None
    require("weight_scale", weight_scale, (torch.float32,), weight.shape[:2], device=device)
    scale = require("x_scale", x_scale, (torch.float32,), (f"{n} or 1",), device=device)
    if scale.shape[0] not in (1, n):
        raise ValueError(f"x_scale must be of shape [{n} or 1], one per row or one for all, got {list(scale.shape)}")
    return scale


def _launcher(backend: str, allowed: tuple[str, ...]) -> Any:
    """The module with a backend's kernels; None for the reference."""
    require_backend(backend, allowed)
    if backend == "triton":
        from happyhorse_fast.ops.triton import fp8_linear as triton_launcher

        return triton_launcher
    if backend == "cuda":
        from happyhorse_fast.ops.cuda import fp8_linear as cuda_launcher

        return cuda_launcher
    return None


# The reference walks row_tiles on the host; as ops of their own they trace and export without a look inside.
_reference = torch.library.custom_op("happyhorse_fast::fp8_linear_reference", reference.fp8_linear, mutates_args=())
_residual_reference = torch.library.custom_op(
    "happyhorse_fast::fp8_linear_residual_reference", reference.fp8_linear_residual, mutates_args=("hidden",)
)
_activation_reference = torch.library.custom_op(
    "happyhorse_fast::fp8_linear_activation_reference", reference.fp8_linear_activation, mutates_args=()
)


@_reference.register_fake
def fake_fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
) -> torch.Tensor:
    """Shape of `fp8_linear`, for both backends."""
    return empty_product(x, weight)


@_residual_reference.register_fake
def fake_fp8_linear_residual(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    hidden: torch.Tensor,
) -> None:
    """`fp8_linear_residual` gives nothing, for both backends."""


@_activation_reference.register_fake
def fake_fp8_linear_activation(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
) -> torch.Tensor:
    """Shape of `fp8_linear_activation`'s y, for every backend."""
    return empty_activated(x.shape[0], weight.shape[1], activation, fp8, x.device)
