"""3D tiles: an order that keeps neighbours in space and time in one block, and a window over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_whole
from happyhorse_fast.block_map.bits import BLOCK
from happyhorse_fast.block_map.dynamic import touching
from happyhorse_fast.block_map.layout import Layout


@ambient.makes_tensors
def tile_order(frames: int, rows: int, columns: int, tile: tuple[int, int, int]) -> torch.Tensor:
    """Video tokens listed tile by tile, row-major among tiles and within a tile: int64 [T * H * W].

    ``video[order]`` brings tokens into this order; blocks are plain runs of 128 of it, since no 3D tile of 128 tokens
    divides 31 x 34 x 60. With tile[0] == 1 no run of a frame's tokens leaves the frame.

    Raises:
        ValueError: A size is less than 1.
    """
    frames, rows, columns = (
        require_whole(name, size, 1) for name, size in (("frames", frames), ("rows", rows), ("columns", columns))
    )
    tile = _three("tile", tile, 1)
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
    across = [-(-n // s) for n, s in zip((frames, rows, columns), tile, strict=True)]
    key = ((t // tile[0]) * across[1] + h // tile[1]) * across[2] + w // tile[2]
    return torch.argsort(key.flatten(), stable=True)


@ambient.makes_tensors
def tile_window(
    layout: Layout,
    columns: int,
    tile: tuple[int, int, int],
    window: tuple[int, int, int],
) -> torch.Tensor:
    """bool [R, S], the blocks that :meth:`BlockMap.tile_window` keeps.

    A block spans the tiles of its tokens, a box in tile coordinates; two blocks see each other where their boxes are at
    most ``window`` apart along every axis. Blocks that hold audio or text see and are seen by every block.
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {layout!r}")
    columns = require_whole("columns", columns, 1)
    tile, window = _three("tile", tile, 1), _three("window", window, 0)
    if layout.frame_tokens % columns:
        raise ValueError(f"columns must divide the {layout.frame_tokens} tokens of a frame, got {columns}")
    rows = layout.frame_tokens // columns
    order = tile_order(layout.frames, rows, columns, tile)
    place = torch.stack([order // (rows * columns), order // columns % rows, order % columns])  # [3, V]
    place = place // torch.tensor(tile)[:, None]
    video = torch.arange(layout.frames * layout.frame_tokens)
    slot = video // layout.frame_tokens * layout.frame_slots + video % layout.frame_tokens
    blocks = -(-layout.slots // BLOCK)
    index = (slot // BLOCK).expand(3, -1)
    low = torch.full((3, blocks), 1 << 30).scatter_reduce_(1, index, place, "amin")
    high = torch.full((3, blocks), -(1 << 30)).scatter_reduce_(1, index, place, "amax")
    reach = torch.tensor(window)[:, None, None]
    near = ((low[:, None, :] - high[:, :, None] <= reach) & (low[:, :, None] - high[:, None, :] <= reach)).all(dim=0)
    prefix = touching(layout.prefix_spans(), blocks)
    return near | prefix[:, None] | prefix[None, :]


def _three(name: str, sizes: Sequence[int], least: int) -> tuple[int, int, int]:
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 3:
        raise TypeError(f"{name} must be three sizes (t, h, w), got {sizes!r}")
    t, h, w = (require_whole(name, size, least) for size in sizes)
    return t, h, w
