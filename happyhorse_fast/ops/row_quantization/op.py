"""Rows to int8, in front of the products whose input no other op quantises."""

from __future__ import annotations

from torch import Tensor

from happyhorse_fast.ops.row_quantization import reference
from happyhorse_fast.ops.row_quantization.contract import QuantizeRows
from happyhorse_fast.ops.runtime.checks import require_backend


def quantize_rows(x: Tensor, hadamard: bool, *, backend: str = "triton") -> tuple[Tensor, Tensor]:
    """Quantise every row to int8 by its own largest magnitude.

    Args:
        x: [N, K] bf16, rows contiguous; K is at most 32768.
        hadamard: Whether each 64 neighbouring channels go through the orthonormal Hadamard matrix first
            (`ops.quantize.hadamard`), as those of the weight went when it was packed; K is a multiple of 64.
        backend: ``"triton"`` or ``"reference"``.

    Returns:
        codes [N, K] int8 and scale [N] float32; value = code * scale, of what the Hadamard gives where there is one. A
        row with a NaN has a scale that is not finite.

    Raises:
        TypeError, ValueError: An argument of another dtype, shape or layout, or a backend there is not.
    """
    given = QuantizeRows(x, hadamard)
    given.check()
    require_backend(backend, ("triton", "reference"))
    op = reference.quantize_rows
    if backend == "triton":
        from happyhorse_fast.ops.row_quantization import triton

        op = triton.quantize_rows
    codes, scale = op(*given.values())
    return codes, scale
