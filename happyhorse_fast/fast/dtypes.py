"""Dtypes that a model is published in, and that packed weights keep."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

from happyhorse_fast.fast.compiled import published_key

LINEAR_DTYPES = (torch.bfloat16, torch.float32)
"""Of linear weights inside layers: as published, and as trained. Everything else is float32."""
PRODUCTS = ("linear_qkv", "linear_proj", "up_gate_proj", "down_proj")


def require_published_dtypes(model: nn.Module) -> None:
    """Raise a ValueError where a tensor of a model that is to be packed has a dtype that the model never had.

    ``model.half()`` and the like round norms, embedders, heads and rotary frequencies, which are float32, for good.
    """
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        name = published_key(key)
        linear = name.startswith("block.layers.") and name.split(".")[-2:-1] and name.split(".")[-2] in PRODUCTS
        allowed = LINEAR_DTYPES if linear else (torch.float32,)
        if tensor.dtype not in allowed:
            listed = " or ".join(_short(dtype) for dtype in allowed)
            raise ValueError(
                f"model must have {name} in {listed} to be accelerated, got {_short(tensor.dtype)}: load the "
                "checkpoint again instead of .half(), .bfloat16(), .double() or .to(dtype), which round what is "
                "published in float32"
            )


def require_kept_dtypes(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raise a TypeError where ``change``, what ``nn.Module.to`` does to each tensor, would give one another dtype."""
    after: dict[tuple[torch.dtype, torch.device], torch.dtype] = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        kind = (tensor.dtype, tensor.device)
        if kind not in after:
            after[kind] = change(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype
        if after[kind] != tensor.dtype:
            raise TypeError(
                f"an accelerated model keeps its dtypes (packed bf16 or 8-bit weights, float32 norms and scales), got "
                f"a conversion of {name} from {_short(tensor.dtype)} to {_short(after[kind])} (.to(dtype), .half(), "
                ".float(), .double() or .bfloat16()): restore(model) first, or move it with .to(device) alone"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
