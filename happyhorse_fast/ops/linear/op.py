"""Linear layers of the experts with their epilogues; docs/OPS.md states every tensor, layout and rounding point."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from happyhorse_fast.ops.linear import cuda, reference
from happyhorse_fast.ops.linear.contract import (
    ActivationQuantize,
    Linear,
    LinearActivation,
    LinearResidual,
    static_scale,
)
from happyhorse_fast.ops.runtime.checks import none_for_empty, require_backend


def fp8_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    row_tiles: Tensor,
    *,
    backend: str = "triton",
) -> Tensor:
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
    given = Linear(x, none_for_empty(x, x_scale), weight, weight_scale, row_tiles)
    given.check()
    return cast(Tensor, _implementation(backend, ("triton", "reference")).fp8_linear(*given.values()))


def fp8_linear_residual(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    row_tiles: Tensor,
    hidden: Tensor,
    *,
    backend: str = "triton",
) -> None:
    """hidden += x . weight, in place; the product is rounded to bf16 first where x is bf16.

    On sm_100, but in int8, the memory adds where hidden, x and weight start on 16 bytes with rows of a multiple of 16;
    else the kernel loads, adds and stores. docs/OPS.md says what differs.

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
    given = LinearResidual(x, none_for_empty(x, x_scale), weight, weight_scale, row_tiles, hidden)
    given.check()
    _implementation(backend, ("triton", "reference")).fp8_linear_residual(*given.values())


def fp8_linear_activation(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    row_tiles: Tensor,
    activation: str,
    fp8: bool,
    *,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
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
    given = LinearActivation(x, none_for_empty(x, x_scale), weight, weight_scale, row_tiles, activation, fp8)
    given.check()
    y = _implementation(backend, ("triton", "cuda", "reference")).fp8_linear_activation(*given.values())
    return y, static_scale(activation, fp8, x.device)


def activation_quantize(
    product: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    row_tiles: Tensor,
    activation: str,
    fp8: bool,
    *,
    backend: str = "cuda",
) -> tuple[Tensor, Tensor]:
    """The epilogue of `fp8_linear_activation` alone, for a product of another GEMM.

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
    given = ActivationQuantize(product, row_scale, column_scale, row_tiles, activation, fp8)
    given.check()
    y = _implementation(backend, ("cuda", "reference")).activation_quantize(*given.values())
    return y, static_scale(activation, fp8, product.device)


def _implementation(backend: str, allowed: tuple[str, ...]) -> Any:
    """The module with a backend's ops; Triton's is imported when it is first called, nothing else here needs it."""
    require_backend(backend, allowed)
    if backend == "triton":
        from happyhorse_fast.ops.linear import triton

        return triton
    return cuda if backend == "cuda" else reference
