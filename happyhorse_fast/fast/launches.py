"""Count the kernels that a layer launches, on a small clip: the number depends on masks, not on sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from happyhorse_fast import ambient
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.ops.block_selection.contract import LAUNCHES

# Layers of every kind. Four frames of 128 tokens, so that a sparse map has something to leave out.
_CONFIG = ModelConfig.preset("tiny")
_SHAPES = ((1, 48, 4, 16, 32), (1, 13, 64), (1, 6, _CONFIG.text_in_channels))
_FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::lift", "aten::is_", "aten::_unsafe_view")


class LaunchCounter(TorchDispatchMode):
    """Counts operations that launch a kernel: all but views and allocations.

    An op of this package counts as the launches it declares, or as one; its name then comes as often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name: str = func._schema.name
        if not func.is_view and not name.startswith(_FREE):
            self.names += [name] * LAUNCHES.get(name, 1)
        return func(*args, **(kwargs or {}))


@ambient.independent
def launches_per_layer(fast: FastConfig) -> list[list[str]]:
    """Names of the launches of each kind of layer, on the second forward pass of a clip.

    Args:
        fast: Precision and sparsity; the launches are counted at the ops, whatever the backend.
    """
    model: nn.Module = accelerate(HappyHorse(_CONFIG).init_weights(0), replace(fast, backend="reference"))
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draw) for shape in _SHAPES]
    counter, counts = LaunchCounter(), []
    marks: list[int] = []
    for layer in model.block.layers:  # type: ignore[union-attr]
        layer.register_forward_pre_hook(lambda *_: marks.append(len(counter.names)))
        layer.register_forward_hook(lambda *_: counts.append(counter.names[marks[-1] :]))
    with torch.no_grad():
        model(*inputs)
        counts.clear()
        with counter:
            model(*inputs)
    return counts
