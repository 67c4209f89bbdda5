"""Launch of the Hopper attention kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.kernels.attention_hopper import block_sparse_attention_hopper_kernel
from happyhorse_fast.kernels.hopper_sizes import GROUPS
from happyhorse_fast.kernels.launch import LaunchConfig
from happyhorse_fast.ops.runtime.triton.device import multiprocessors

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv}


def described(x: Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """A matrix, read in tiles, with their layout in shared memory."""
    layout = gl.NVMMASharedLayout.get_default_for(list(tile), ELEMENTS[x.dtype])
    return TensorDescriptor.from_tensor(x, list(tile), layout)


def launch(
    config: LaunchConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: tuple[Any, ...],
    numbers: tuple[int, ...],
    sizes: dict[str, Any],
) -> None:
    """Launch it: bf16, and int8 q and k, with a bounded softmax, e4m3 with a running maximum.

    Args:
        config: Its configuration.
        q: Matrix [N, Hq * D]; 16-byte aligned, as k and v.
        k: Matrix [M, Hkv * D].
        v: Matrix [M, Hkv * D], or [Hkv * D, S * 128] in e4m3.
        tensors: Arguments of both kernels, out to scale.
        numbers: Queries, rows of a map, blocks of keys, work items.
        sizes: What the kernel is compiled for: heads and head dim as it names them, and the compiler's options.
    """
    tile = (BLOCK, sizes["D"])
    block_sparse_attention_hopper_kernel[(min(numbers[-1], multiprocessors(q.device)),)](
        described(q, (BLOCK // GROUPS.value, sizes["D"])),
        described(k, tile),
        described(v, tile[::-1] if v.dtype == torch.float8_e4m3fn else tile),
        *tensors,
        *numbers,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **sizes,
    )
