"""The `quantize_rows` op of docs/OPS.md in plain torch, with the rounding points of the kernel."""

from __future__ import annotations

import torch

from happyhorse_fast import ambient
from happyhorse_fast.reference.quantize import hadamard, int8_rows

ROW_CHUNK = 4096
"""Rows in flight: of 13,696 channels 224 MB of float32."""


def empty_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of `quantize_rows`, not yet written: codes [N, K] int8, scale [N] float32."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


@ambient.independent
def quantize_rows(x: torch.Tensor, through_hadamard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to int8 with a scale each.

    Args:
        x: [N, K] bf16.
        through_hadamard: Whether `quantize.hadamard` comes first; K is a multiple of 64.

    Returns:
        codes [N, K] int8, scale [N] float32.
    """
    codes, scale = empty_codes(x)
    for first in range(0, x.shape[0], ROW_CHUNK):
        rows = slice(first, first + ROW_CHUNK)
        values = x[rows].float()
        codes[rows], scale[rows] = int8_rows(hadamard(values) if through_hadamard else values)
    return codes, scale
