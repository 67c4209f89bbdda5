"""Checks of arguments that several layers share; every message names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class CheckpointError(ValueError):
    """A checkpoint folder or file that cannot be loaded; the message names the file and, if there is one, the key."""


class NonFiniteError(FloatingPointError):
    """NaN or Inf where finite numbers are needed; the message names the tensor and how many elements are affected."""


def listed(items: Iterable[str]) -> str:
    """The first five items and how many more there are, for a message."""
    every = list(items)
    more = f"; and {len(every) - 5} more" if len(every) > 5 else ""
    return "; ".join(every[:5]) + more


def plain_number(value: object) -> object:
    """A scalar of numpy, or a tensor or array without dimensions, as Python's number; anything else as it is."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False):
        return item()
    return value


def whole_number(value: object) -> int | None:
    """An int of Python, numpy or torch as Python's; None where it is none, a float without a fraction included."""
    number = plain_number(value)
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def real_number(value: object) -> float | None:
    """A number of Python, numpy or torch as a float; None where it is none, or a bool."""
    number = plain_number(value)
    return float(number) if isinstance(number, (int, float)) and not isinstance(number, bool) else None


def require_whole(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """A whole number within bounds, as :func:`whole_number` takes it.

    Raises:
        TypeError: Not a whole number.
        ValueError: Out of bounds.
    """
    allowed = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    number = whole_number(value)
    if number is None:
        raise TypeError(f"{name} must be an integer, {allowed}; got {value!r} of type {type(value).__name__}")
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def require_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a ValueError where a value, which need not hash, is none of those that are allowed."""
    choices = tuple(allowed)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def require_number(name: str, value: object, allowed: str, fits: Callable[[float], bool]) -> float:
    """A number that ``fits``.

    Raises:
        TypeError: Not a number.
        ValueError: It does not; ``allowed`` says what would.
    """
    number = real_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not fits(number):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def require_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    *,
    device: torch.device | None = None,
    dtypes: Sequence[torch.dtype] = (),
    near: str = "where the model is",
) -> torch.Tensor:
    """Hold a tensor argument against its dtype, shape and device.

    Args:
        name: The argument's name, for the message.
        value: What came.
        shape: Allowed size per dimension: an int for exactly that, a string such as ``"T"`` for any size of at least 1.
        device: Device it must be on, or None for any.
        dtypes: Allowed ones; those of floating-point numbers by default.
        near: What else is on that device, for the message.

    Returns:
        ``value``, typed as a tensor.

    Raises:
        TypeError: Not a tensor, or of another dtype.
        ValueError: Wrong rank, size or device.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {_listed(shape)}, got {type(value).__name__}")
    if value.dtype not in (dtypes or (torch.float16, torch.bfloat16, torch.float32, torch.float64)):
        came = f"{value.dtype} of shape {_listed(value.shape)}"
        wanted = " or ".join(map(str, dict.fromkeys(dtypes))) or "float16, bfloat16, float32 or float64"
        raise TypeError(f"{name} must be {wanted}, got {came}")
    if value.dim() != len(shape):
        came = f"{value.dim()}: {_listed(value.shape)}"
        raise ValueError(f"{name} must have {len(shape)} dimensions {_listed(shape)}, got {came}")
    for axis, (allowed, size) in enumerate(zip(shape, value.shape, strict=True)):
        if isinstance(allowed, int) and size != allowed:
            where = f"in dimension {axis} of {_listed(shape)}"
            raise ValueError(f"{name} must be of size {allowed} {where}, got {_listed(value.shape)}")
        if isinstance(allowed, str) and size < 1:
            where = f"in dimension {axis} ({allowed})"
            raise ValueError(f"{name} must have at least 1 element {where}, got {_listed(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on device {device}, {near}; got {value.device}")
    return value


def _listed(sizes: Sequence[int | str]) -> str:
    # Only for messages: torch.compile does not trace str() of a dynamic size.
    return f"[{', '.join(map(str, sizes))}]"


def require_finite(name: str, value: torch.Tensor) -> None:
    """Raise where a tensor holds NaN or Inf.

    Skipped where a value cannot be read: while tracing or compiling, on fake and meta tensors, and during CUDA-graph
    capture.

    Raises:
        NonFiniteError: With the number of elements affected.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    if torch.compiler.is_compiling() or isinstance(value, FakeTensor) or value.is_meta:
        return
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise NonFiniteError(f"{name} must be finite, got {bad} NaN or Inf among {value.numel()} elements")
