"""Launcher of the `quantize_rows` kernel; its arguments were checked."""

from __future__ import annotations

import triton
from torch import Tensor

from happyhorse_fast.kernels.launch import config_for
from happyhorse_fast.kernels.row_quantization import quantize_rows_kernel
from happyhorse_fast.ops.row_quantization.contract import QuantizeRows
from happyhorse_fast.ops.runtime.triton.device import architecture, multiprocessors
from happyhorse_fast.ops.runtime.triton.library import kernel_op

STEM = "row_quantization"
NARROWEST, WARP = 4096, 32
"""Channels of the narrowest row in the table: 64 groups of 64, a product of one warp group. Threads of a warp."""
THREADS_PER_SM = 512
"""Of all programs of one multiprocessor: 128 registers each."""


def variant_of(channels: int) -> str:
    """The launch configuration's name: places of a row, a power of two."""
    return f"columns_{max(NARROWEST, triton.next_power_of_2(channels))}"


@kernel_op("quantize_rows", QuantizeRows, kernel=quantize_rows_kernel)
def quantize_rows(given: QuantizeRows) -> tuple[Tensor, Tensor]:
    """Launch the kernel on all rows, a row at a time."""
    x, (codes, scale) = given.x, given.empty()
    rows, channels = x.shape
    config = config_for(STEM, variant_of(channels), architecture(x.device))
    programs = multiprocessors(x.device) * max(1, THREADS_PER_SM // (WARP * config.num_warps))
    quantize_rows_kernel[(min(rows, programs),)](
        x,
        codes,
        scale,
        rows,
        x.stride(0),
        K=channels,
        HADAMARD_ROWS=given.hadamard,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        **config.options(),
    )
    return codes, scale
