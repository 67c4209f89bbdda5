"""Attention for Hopper and other GPUs, dense or by a block map, exact: the public names of the kernel repository."""

from __future__ import annotations

from happyhorse_fast.block_map import BlockMap, BlockSelector, Layout
from happyhorse_fast.hosts.hub import layers
from happyhorse_fast.ops.attention.op import block_sparse_attention
from happyhorse_fast.ops.attention.sdpa import attention
from happyhorse_fast.ops.block_selection.op import select_blocks

__all__ = ["BlockMap", "BlockSelector", "Layout", "attention", "block_sparse_attention", "layers", "select_blocks"]
