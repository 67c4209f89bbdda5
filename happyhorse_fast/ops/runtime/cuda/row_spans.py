"""Which rows belong to which expert, as the host must know to call a library's GEMM, without waiting at every call."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from happyhorse_fast.ops.runtime.checks import is_capturing
from happyhorse_fast.ops.runtime.row_tiles import ROW_TILE, Span, joined

PRODUCT_BYTES = 256 * 2**20
"""Of a chunk's product: in float32 2432 rows by 27392 features, 4066 tiles of 128 x 128 for 132 multiprocessors."""


class RowTiles(ctypes.Structure):
    """`RowTiles` of csrc/device/product.cuh: a table on the device, or rows of one expert where that is null."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        ("expert", ctypes.c_int),
        ("first", ctypes.c_int),
        ("end", ctypes.c_int),
    ]


@dataclass(frozen=True)
class _Read:
    """Content of a table, and its version then, which writing in place changes; an inference tensor has None."""

    version: int | None
    tiles: tuple[Span, ...]


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def expert_spans(row_tiles: torch.Tensor, experts: int, rows: int, *, whole_tiles: bool) -> list[Span]:
    """Spans of consecutive rows of one expert, in order.

    One expert has all rows: nothing is read. Else the table comes to the host once per tensor object, and is remembered
    for as long as that lives. (torch's grouped products take offsets on the device, but give bf16 alone from e4m3, and
    that on sm_90 and sm_100 only; a product of all rows per expert is three times the work.)

    Args:
        row_tiles: [tiles, 3] int32.
        experts: E.
        rows: N.
        whole_tiles: Every tile must start on a multiple of 128.

    Raises:
        ValueError: A tile does not start on such a multiple.
        RuntimeError: The table was not read before, and a CUDA graph is being captured.
    """
    if experts == 1:
        return [(0, 0, rows)]
    tiles = _tiles(row_tiles)
    for _, first, _ in tiles:
        if whole_tiles and first % ROW_TILE:
            raise ValueError(f'row_tiles must start on multiples of {ROW_TILE} unless out is "bf16", got {first}')
    return joined(tiles)


def chunks(spans: list[Span], features: int, element_bytes: int) -> Iterator[Span]:
    """Cut spans into whole row tiles whose product [rows, features] is at most :data:`PRODUCT_BYTES`, or one tile."""
    tiles = max(1, PRODUCT_BYTES // (ROW_TILE * features * element_bytes))
    for expert, first, end in spans:
        for start in range(first, end, tiles * ROW_TILE):
            yield expert, start, min(start + tiles * ROW_TILE, end)


def _tiles(row_tiles: torch.Tensor) -> tuple[Span, ...]:
    version = None if row_tiles.is_inference() else row_tiles._version
    known: _Read | None = _read.get(row_tiles)
    if known is not None and known.version == version:
        return known.tiles
    if is_capturing(row_tiles.device):
        raise RuntimeError(
            "row_tiles of several experts must reach the host before a CUDA graph is captured, for backend 'cuda': "
            "call the op once before the capture, with the same row_tiles tensor (not a copy or a new view)"
        )
    tiles = tuple((expert, first, end) for expert, first, end in row_tiles.tolist())
    _read[row_tiles] = _Read(version, tiles)
    return tiles
