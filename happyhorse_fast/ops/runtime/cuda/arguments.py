"""What every launcher of CUDA kernels does with its tensors."""

from __future__ import annotations

import torch


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's elements start; None, a null pointer, where there is no tensor or it is empty."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def require_vectors(count: int, **tensors: torch.Tensor | None) -> None:
    """Hold tensors against what vector loads need: rows of whole vectors, each aligned to its size.

    Args:
        count: Elements of a vector.
        tensors: By their argument's name.

    Raises:
        ValueError: A row or its address is not a multiple of ``count`` elements.
    """
    for name, tensor in tensors.items():
        if tensor is None or not tensor.numel():
            continue
        apart = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
        if tensor.shape[-1] % count or any(stride % count for stride in apart):
            raise ValueError(
                f"{name} must have rows of a multiple of {count} elements, a multiple of {count} apart, for backend "
                f"'cuda'; got shape {list(tensor.shape)}, strides {list(tensor.stride())}"
            )
        if tensor.data_ptr() % (count * tensor.element_size()):
            raise ValueError(
                f"{name} must start on a multiple of {count * tensor.element_size()} bytes for backend 'cuda', "
                f"got address {tensor.data_ptr():#x}"
            )
