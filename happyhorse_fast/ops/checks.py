"""Checks of op arguments; every message names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROW_STRIDE_LIMIT = 2**24
"""Rows of a tile are addressed in int32: 128 rows of at most this many elements."""


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
