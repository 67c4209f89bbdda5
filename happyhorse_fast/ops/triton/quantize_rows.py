"""Launcher of the `quantize_rows` kernel, as a torch.library op; arguments were checked by `ops.quantize_rows`."""

from __future__ import annotations

import torch
import triton

from happyhorse_fast.kernels.launch import FP_FUSION, config_for
from happyhorse_fast.kernels.quantize_rows import quantize_rows_kernel
from happyhorse_fast.ops import quantize_rows as shapes
from happyhorse_fast.ops.triton.device import architecture, multiprocessors, on_device
from happyhorse_fast.ops.triton.library import kernel_op, launchable
from happyhorse_fast.reference.quantize_rows import empty_codes

STEM = "quantize_rows"
NARROWEST, WARP = 4096, 32
"""Channels of the narrowest row in the table: 64 groups of 64, a product of one warp group. Threads of a warp."""
THREADS_PER_SM = 512
"""Of all programs of one multiprocessor: 128 registers each."""


def variant_of(channels: int) -> str:
    """The launch configuration's name: places of a row, a power of two."""
    return f"columns_{max(NARROWEST, triton.next_power_of_2(channels))}"


@kernel_op("happyhorse_fast::quantize_rows", kernel=quantize_rows_kernel)
def quantize_rows(x: torch.Tensor, hadamard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`happyhorse_fast.ops.quantize_rows.quantize_rows`."""
    codes, scale = empty_codes(x)
    rows, channels = x.shape
    config = config_for(STEM, variant_of(channels), architecture(x.device))
    programs = multiprocessors(x.device) * max(1, THREADS_PER_SM // (WARP * config.num_warps))
    with on_device(x):
        launchable(quantize_rows_kernel)[(min(rows, programs),)](
            x,
            codes,
            scale,
            rows,
            x.stride(0),
            K=channels,
            HADAMARD_ROWS=hadamard,
            BLOCK_K=config.block_k,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
    return codes, scale


quantize_rows.register_fake(shapes.fake)
