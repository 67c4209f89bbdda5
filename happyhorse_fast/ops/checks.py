"""Checks of op arguments; every message names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROW_STRIDE_LIMIT = 2**24
"""Rows of a tile are addressed in int32: 128 rows of at most this many elements."""


def is_capturing(device: torch.device) -> bool:
    """Whether work on ``device``'s current stream goes into a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # a fake tensor may be on a GPU that is not there
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def require_backend(backend: str, allowed: tuple[str, ...]) -> None:
    """Hold a backend's name against those an op has.

    Raises:
        ValueError: It is not one of them.
    """
    if backend not in allowed:
        raise ValueError(f"backend must be {' or '.join(map(repr, allowed))}, got {backend!r}")


def require(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    *,
    device: torch.device,
    strided_rows: bool = False,
) -> torch.Tensor:
    """Hold a tensor argument of an op against its dtype, shape, device and strides.

    Args:
        name: The argument's name, for the message.
        value: What came.
        dtypes: Allowed dtypes.
        shape: Size per dimension; a string such as ``"N"`` for any size of at least 1.
        device: Device it must be on.
        strided_rows: Allow any stride between rows, with contiguous rows, rather than only a contiguous tensor.

    Returns:
        ``value``, typed as a tensor.

    Raises:
        TypeError: Not a tensor, or not of an allowed dtype.
        ValueError: Wrong shape, device or strides.
    """
    wanted = f"[{', '.join(map(str, shape))}]"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {wanted}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    fits = value.dim() == len(shape) and all(
        (size >= 1) if isinstance(allowed, str) else size == allowed
        for allowed, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be of shape {wanted}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the first argument, got {value.device}")
    if strided_rows:
        apart = value.stride(0)
        if value.stride(-1) != 1 or apart >= ROW_STRIDE_LIMIT or (len(value) > 1 and apart < value.shape[-1]):
            raise ValueError(
                f"{name} must have contiguous rows, fewer than {ROW_STRIDE_LIMIT} elements apart, "
                f"got strides {list(value.stride())}"
            )
    elif not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(value.stride())} of shape {list(value.shape)}")
    return value


def check_row_tiles(row_tiles: torch.Tensor, rows: int, experts: int) -> None:
    """Hold a table of row tiles against what the ops trust it to be; it is read back, so not to be called per step.

    A row that no tile covers stays unwritten; an expert that is not there is read out of bounds.

    Args:
        row_tiles: int32 [tiles, 3], (expert, first row, end row).
        rows: N.
        experts: E.

    Raises:
        TypeError, ValueError: It is no such table; an expert is not there; a tile is empty or of more than 128 rows; or
            the tiles do not cover every row once, in order. Names the first tile that is wrong.
    """
    require("row_tiles", row_tiles, (torch.int32,), ("tiles", 3), device=row_tiles.device)
    expected = 0
    for i, (expert, first, end) in enumerate(row_tiles.tolist()):
        if not 0 <= expert < experts:
            raise ValueError(f"row_tiles must name experts from 0 to {experts - 1}, got {expert} in tile {i}")
        if first != expected or not first < end <= min(first + 128, rows):
            raise ValueError(
                f"row_tiles must cover rows 0 to {rows} once, in order and in tiles of at most 128; tile {i} is "
                f"{first} to {end}, wanted is one from {expected} on"
            )
        expected = end
    if expected != rows:
        raise ValueError(f"row_tiles must cover all {rows} rows, got tiles up to {expected}")
