"""TMA descriptors for Gluon, which know the layout of their tiles in shared memory."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper

from happyhorse_fast.kernels.product_beside import COLUMNS, ROWS

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv}


def described_in_shared(x: Tensor, tile: tuple[int, int]) -> hopper.TensorDescriptor:
    """A matrix, read in tiles."""
    layout = gl.NVMMASharedLayout.get_default_for(list(tile), ELEMENTS[x.dtype])
    return hopper.TensorDescriptor.from_tensor(x, list(tile), layout)


def described_operands(x: Tensor, weight: Tensor) -> tuple[hopper.TensorDescriptor, hopper.TensorDescriptor]:
    """x [N, K] and weight [E, F, K], in tiles of 128 bytes by the rows or features that a group has at once."""
    chunk = 128 // x.element_size()
    features = COLUMNS.value // (2 if x.dtype == torch.int8 else 1)
    return (
        described_in_shared(x, (ROWS.value, chunk)),
        described_in_shared(weight.flatten(0, 1), (features, chunk)),
    )
