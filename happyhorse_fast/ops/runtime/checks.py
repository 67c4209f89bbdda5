"""Checks of op arguments; every message names the argument, what came and what is allowed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from happyhorse_fast.arguments import require_tensor

ROW_STRIDE_LIMIT = 2**24
"""Rows of a tile are addressed in int32: 128 rows of at most this many elements."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Found out once: an op is called some hundred times a step."""
HEAD_DIMS = (32, 64, 128)
"""Channels of a head that kernels are made for."""


def compute_capability(device: torch.device) -> int | None:
    """As 90 for 9.0; None where ``device`` is no GPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_capturing(device: torch.device) -> bool:
    """Whether work on ``device``'s current stream goes into a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # a fake tensor may be on a GPU that is not there
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def has_tangent(x: torch.Tensor) -> bool:
    """Whether ``x`` carries a tangent: ``torch.func.jvp`` silently takes those of an op of one's own for zeros."""
    return forward_ad.unpack_dual(x).tangent is not None


def is_differentiated(x: torch.Tensor) -> bool:
    """Whether a call with ``x`` is to be differentiated: backward, or forward."""
    return (x.requires_grad and torch.is_grad_enabled()) or has_tangent(x)


def require_backend(backend: str, allowed: tuple[str, ...]) -> None:
    """Hold a backend's name against those an op has.

    Raises:
        ImportError: It is Triton's, which is not installed.
        ValueError: It is not one of them.
    """
    if backend not in allowed:
        raise ValueError(f"backend must be {' or '.join(map(repr, allowed))}, got {backend!r}")
    if backend == "triton" and not HAS_TRITON:
        raise ImportError("backend 'triton' needs Triton, which is not installed; 'reference' runs in plain torch")


def require(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    *,
    device: torch.device,
    strided_rows: bool = False,
) -> torch.Tensor:
    """Hold a tensor argument of an op against its dtype, shape, device and strides, as :func:`require_tensor` does.

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
    tensor = require_tensor(name, value, shape, device=device, dtypes=dtypes, near="like the first argument")
    if strided_rows:
        apart = tensor.stride(0)
        if tensor.stride(-1) != 1 or apart >= ROW_STRIDE_LIMIT or (len(tensor) > 1 and apart < tensor.shape[-1]):
            raise ValueError(
                f"{name} must have contiguous rows, fewer than {ROW_STRIDE_LIMIT} elements apart, "
                f"got strides {list(tensor.stride())}"
            )
    elif not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {list(tensor.stride())} of shape {list(tensor.shape)}"
        )
    return tensor


def require_scale(
    name: str, value: torch.Tensor | None, of: str, codes: torch.Tensor, shape: Sequence[int | str]
) -> None:
    """Hold the scale of argument ``of`` against the contract: float32 of a shape for codes, none for bf16."""
    if (value is not None) != (codes.dtype != torch.bfloat16):
        came = "none" if value is None else f"one of shape {list(value.shape)}"
        raise ValueError(f"{name} must be given exactly where {of} has 8 bits; {of} is {codes.dtype}, got {came}")
    if value is not None:
        require(name, value, (torch.float32,), shape, device=codes.device)


def none_for_empty(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.Tensor | None:
    """``x_scale``; None for the empty one that an op gives beside an ``x`` in bf16."""
    empty = x_scale is not None and not x_scale.numel()
    return None if empty and x.dtype == torch.bfloat16 else x_scale


def require_product_scale(
    name: str, value: torch.Tensor | None, shape: Sequence[int | str], of: str, codes: torch.Tensor, none: str = "None"
) -> None:
    """Hold a scale of a product against the dtype of argument ``of``: float32 of a shape for codes, none for bf16."""
    if codes.dtype != torch.bfloat16:
        require(name, value, (torch.float32,), shape, device=codes.device)
    elif value is not None:
        raise ValueError(f"{name} must be {none} where {of} is bf16, got shape {list(value.shape)}")
