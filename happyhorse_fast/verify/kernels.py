"""Every kernel against its reference on one device, whatever is remembered of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from happyhorse_fast.ops.runtime import self_check
from happyhorse_fast.ops.runtime.obstacles import triton_obstacle
from happyhorse_fast.ops.runtime.self_check import KernelCheck


def check_kernels(device: torch.device, progress: Callable[[str], None]) -> list[KernelCheck]:
    """Run the self-check of every Triton kernel.

    Args:
        device: Where to run.
        progress: Called with a line per kernel.

    Raises:
        ValueError: Triton kernels cannot run there.
    """
    obstacle = triton_obstacle(device)
    if obstacle is not None:
        raise ValueError(f"--kernels needs a device that runs Triton kernels: {obstacle}")
    # e4m3 in hardware: compute capability 8.9; the interpreter has every format.
    fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    found = []
    for check in self_check.run_checks("triton", device, fp8=fp8):
        progress(f"{check.op} {check.variant}: {check.seconds:.1f} s")
        found.append(check)
    return found
