"""TMA descriptors for Gluon, which know the layout of their tiles in shared memory."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper

from happyhorse_fast.kernels.product_beside import COLUMNS, ROWS
from happyhorse_fast.ops.runtime.triton.device import descriptors_work

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv}


def described_in_shared(x: Tensor, tile: tuple[int, int]) -> hopper.TensorDescriptor:
    """A matrix, read in tiles."""
    layout = gl.NVMMASharedLayout.get_default_for(list(tile), ELEMENTS[x.dtype])
    return hopper.TensorDescriptor.from_tensor(x, list(tile), layout)


def described_operands(x: Tensor, weight: Tensor) -> tuple[hopper.TensorDescriptor, hopper.TensorDescriptor]:
    """x [N, K] and weight [E, F, K] as `kernels/product_beside.py` reads them: 128 bytes of a group's rows or features.

    Raises:
        ValueError: No TMA descriptor can read one of them.
    """
    if not descriptors_work(x, weight):
        raise ValueError("x and weight must start on 16 bytes, with rows of a multiple of 16, for TMA descriptors")
    chunk = 128 // x.element_size()
    features = COLUMNS.value // (2 if x.dtype == torch.int8 else 1)
    return (
        described_in_shared(x, (ROWS.value, chunk)),
        described_in_shared(weight.flatten(0, 1), (features, chunk)),
    )
