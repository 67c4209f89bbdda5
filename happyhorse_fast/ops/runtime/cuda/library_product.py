"""Products by torch's own library, for the CUDA kernels that finish them, and whose rows are whose, on the host."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from happyhorse_fast import ambient
from happyhorse_fast.kernels.launch import ROW_TILE
from happyhorse_fast.ops.runtime.checks import is_capturing
from happyhorse_fast.ops.runtime.cuda.parameters import Parameters, require_vectors, struct
from happyhorse_fast.ops.runtime.row_tiles import Span, joined

FP8_SINCE = (8, 9)
CODES_PER_VECTOR = 16
INT8_ROWS = 17
"""Fewest rows that torch._int_mm takes on a GPU (torch 2.13: "self.size(0) needs to be greater than 16")."""
PRODUCT_BYTES = 256 * 2**20
"""Of a chunk's product: in float32 2432 rows by 27392 features, 4066 tiles of 128 x 128 for 132 multiprocessors."""
RowTiles = struct("RowTiles", "product.cuh")
"""A table on the device, or rows of one expert where that is null."""


def products(
    x: torch.Tensor, weight: torch.Tensor, row_tiles: torch.Tensor, *, whole_tiles: bool
) -> Iterator[tuple[torch.Tensor, Parameters, int]]:
    """Products of each row with its expert's weight, in chunks of rows that a kernel finishes one after another.

    Args:
        x: [N, K] bf16, int8 or e4m3.
        weight: [E, F, K] in the dtype of x.
        row_tiles: [tiles, 3] int32.
        whole_tiles: Every tile must start on a multiple of 128.

    Returns:
        (product [rows, F] as :func:`library_product` gives it, its rows, and how many row tiles they are).

    Raises:
        ValueError, RuntimeError: As :func:`check_operands` and :func:`expert_spans`.
    """
    check_operands(x, weight)
    experts, features, _ = weight.shape
    spans = expert_spans(row_tiles, experts, x.shape[0], whole_tiles=whole_tiles)
    one = scale_of_one(x)
    for expert, first, end in chunks(spans, features, 2 if x.dtype == torch.bfloat16 else 4):
        rows = RowTiles(table=None, expert=expert, first=first, end=end)
        yield library_product(x[first:end], weight[expert], one), rows, -(-(end - first) // ROW_TILE)


def check_operands(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Hold codes against what the library takes, where that says it late or not at all.

    Args:
        x: [N, K] bf16, int8 or e4m3.
        weight: [E, F, K] in the dtype of x.

    Raises:
        ValueError: e4m3 on a GPU without, or with rows that are not whole vectors of 16 bytes.
    """
    if x.dtype == torch.bfloat16:
        return
    if x.dtype == torch.float8_e4m3fn and x.is_cuda and torch.cuda.get_device_capability(x.device) < FP8_SINCE:
        arch = "".join(map(str, torch.cuda.get_device_capability(x.device)))
        raise ValueError(f"x must be bf16 on sm_{arch} for backend 'cuda': e4m3 products are from sm_89 on")
    require_vectors(CODES_PER_VECTOR, x=x, weight=weight)


def scale_of_one(x: torch.Tensor) -> torch.Tensor | None:
    """The scale that the library asks for with e4m3, on the device of x; None where it asks for none.

    Made once for all chunks of a call, since a kernel fills it; not kept longer, since a CUDA graph may own its memory.
    """
    return None if x.dtype != torch.float8_e4m3fn else torch.ones((), dtype=torch.float32, device=x.device)


@ambient.independent
def library_product(x: torch.Tensor, weight: torch.Tensor, one: torch.Tensor | None) -> torch.Tensor:
    """x . weight of one expert, accumulated in float32, of int8 in int32.

    Args:
        x: [rows, K] bf16, int8 or e4m3, rows contiguous.
        weight: [F, K] in the dtype of x.
        one: :func:`scale_of_one` of x.

    Returns:
        [rows, F]: rounded to bf16 of bf16; of codes the float32 sums, without scales, of int8 rounded from int32.
    """
    if x.dtype == torch.int8:
        # The library takes at least 17 rows of int8; rows of zeros are dropped again.
        rows = x if len(x) >= INT8_ROWS else torch.nn.functional.pad(x, (0, 0, 0, INT8_ROWS - len(x)))
        return torch._int_mm(rows, weight.T)[: len(x)].float()
    if one is None:
        return linear(x, weight)
    if x.device.type == "cpu":
        # torch._scaled_mm gives the same here, in a loop of 10 MFLOP/s (torch 2.13).
        return x.float() @ weight.float().T
    # use_fast_accum stays False: partial sums go to float32 registers, as the library's default has it.
    return torch._scaled_mm(x, weight.T, one, one, out_dtype=torch.float32)


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Table -> its version when it was read, which writing changes (an inference tensor has None), and its tiles."""


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


def _tiles(row_tiles: torch.Tensor) -> list[Span]:
    version = None if row_tiles.is_inference() else row_tiles._version
    known_version, known = _read.get(row_tiles, (None, None))
    if known is not None and known_version == version:
        return known
    if is_capturing(row_tiles.device):
        raise RuntimeError(
            "row_tiles of several experts must reach the host before a CUDA graph is captured, for backend 'cuda': "
            "call the op once before the capture, with the same row_tiles tensor (not a copy or a new view)"
        )
    tiles = [(expert, first, end) for expert, first, end in row_tiles.tolist()]
    _read[row_tiles] = version, tiles
    return tiles
