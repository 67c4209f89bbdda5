"""Rows to int8, in front of the products whose input no other op quantises: arguments, results, choice of backend.

docs/OPS.md states every tensor and rounding point. Nothing here needs Triton: its launcher is imported when it is first
called.
"""

from __future__ import annotations

import torch

from happyhorse_fast.ops.checks import require, require_backend
from happyhorse_fast.reference import quantize_rows as reference
from happyhorse_fast.reference.quantize import HADAMARD
from happyhorse_fast.reference.quantize_rows import empty_codes

MAX_CHANNELS = 32768
"""A program holds a row in registers: 64 values in each of 512 threads."""


def quantize_rows(x: torch.Tensor, hadamard: bool, *, backend: str = "triton") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise every row to int8 by its own largest magnitude.

    Args:
        x: [N, K] bf16, rows contiguous; K is at most 32768.
        hadamard: Whether each 64 neighbouring channels go through the orthonormal Hadamard matrix first
            (`reference.quantize.hadamard`), as those of the weight went when it was packed; K is a multiple of 64.
        backend: ``"triton"`` or ``"reference"``.

    Returns:
        codes [N, K] int8 and scale [N] float32; value = code * scale, of what the Hadamard gives where there is one. A
        row with a NaN has a scale that is not finite.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape or layout, or a backend there is not.
    """
    require("x", x, (torch.bfloat16,), ("N", "K"), device=x.device, strided_rows=True)
    channels = x.shape[1]
    if channels > MAX_CHANNELS:
        raise ValueError(f"x must have at most {MAX_CHANNELS} channels, got {channels}")
    if hadamard and channels % HADAMARD:
        raise ValueError(f"x must have a multiple of {HADAMARD} channels where hadamard is True, got {channels}")
    require_backend(backend, ("triton", "reference"))
    if backend == "reference":
        return _reference(x, hadamard)
    from happyhorse_fast.ops.triton import quantize_rows as launcher

    return launcher.quantize_rows(x, hadamard)


# As an op of its own it counts as one launch, like the kernel it stands in for.
@torch.library.custom_op("happyhorse_fast::quantize_rows_reference", mutates_args=())
def _reference(x: torch.Tensor, hadamard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_rows(x, hadamard)


@_reference.register_fake
def fake(x: torch.Tensor, hadamard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of `quantize_rows`, for both backends."""
    return empty_codes(x)
