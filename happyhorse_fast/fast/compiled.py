"""The module inside torch.compile's wrapper, which is of another type and has longer keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_ATTRIBUTE = "_orig_mod"


def unwrapped(model: Any) -> Any:
    """The module that ``torch.compile(model)`` wraps; anything else as it is."""
    while isinstance(model, nn.Module) and isinstance(inner := model._modules.get(_ATTRIBUTE), nn.Module):
        model = inner
    return model


def published_key(key: str) -> str:
    """A state-dict key without the names of wrappers, wherever they stand: ``_orig_mod.block.layers.0...``."""
    return ".".join(part for part in key.split(".") if part != _ATTRIBUTE)


def state_dict_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict under published keys, though it or a part of it is compiled."""
    return {published_key(key): value for key, value in module.state_dict().items()}
