"""The `quantize_rows` op of docs/OPS.md in plain torch, with the rounding points of the kernel."""

from __future__ import annotations

from torch import Tensor

from happyhorse_fast.ops.quantize import hadamard, int8_rows
from happyhorse_fast.ops.row_quantization.contract import QuantizeRows
from happyhorse_fast.ops.runtime.operation import reference_op

ROW_CHUNK = 4096
"""Rows in flight: of 13,696 channels 224 MB of float32."""


@reference_op(QuantizeRows)
def quantize_rows(given: QuantizeRows) -> tuple[Tensor, Tensor]:
    """Rows to int8 with a scale each."""
    codes, scale = given.empty()
    for first in range(0, given.x.shape[0], ROW_CHUNK):
        rows = slice(first, first + ROW_CHUNK)
        values = given.x[rows].float()
        codes[rows], scale[rows] = int8_rows(hadamard(values) if given.hadamard else values)
    return codes, scale
