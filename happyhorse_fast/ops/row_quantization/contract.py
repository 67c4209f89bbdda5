"""The arguments and results of `quantize_rows`; docs/OPS.md states every tensor and rounding point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from happyhorse_fast.ops.quantize import HADAMARD
from happyhorse_fast.ops.runtime.checks import require
from happyhorse_fast.ops.runtime.operation import Arguments

MAX_CHANNELS = 32768
"""A program holds a row in registers: 64 values in each of 512 threads."""


@dataclass(frozen=True)
class QuantizeRows(Arguments):
    """Arguments of :func:`ops.row_quantization.op.quantize_rows`."""

    x: Tensor
    hadamard: bool

    def check(self) -> None:
        """Hold the arguments against the contract."""
        require("x", self.x, (torch.bfloat16,), ("N", "K"), device=self.x.device, strided_rows=True)
        channels = self.x.shape[1]
        if channels > MAX_CHANNELS:
            raise ValueError(f"x must have at most {MAX_CHANNELS} channels, got {channels}")
        if self.hadamard and channels % HADAMARD:
            raise ValueError(f"x must have a multiple of {HADAMARD} channels where hadamard is True, got {channels}")

    def empty(self) -> tuple[Tensor, Tensor]:
        """codes [N, K] int8, scale [N] float32."""
        codes = torch.empty(self.x.shape, dtype=torch.int8, device=self.x.device)
        return codes, torch.empty(self.x.shape[0], dtype=torch.float32, device=self.x.device)
