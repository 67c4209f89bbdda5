"""How long each op of a forward pass takes, on the device's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = "happyhorse_fast::"
PRODUCTS, ATTENTION, OTHER = "products", "attention", "other"
"""Names of what eager torch runs."""


class OpTimes(TorchDispatchMode):
    """Times every operation while it is entered: this package's by name, torch's as products, attention and other.

    CUDA events around each operation cost about 10 us of host time, which a forward pass of short ops does not hide:
    the sum over ops is then more than the pass takes without.

    Args:
        device: Where the operations run.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Callable[[], float]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = group_of(func._schema.name)
        if func.is_view:
            return func(*args, **(kwargs or {}))
        if not self._on_gpu:
            began = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            took = time.perf_counter() - began
            self._spans.append((name, lambda: took))
            return result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = func(*args, **(kwargs or {}))
        end.record()
        self._spans.append((name, lambda: start.elapsed_time(end) / 1e3))
        return result

    def seconds(self) -> dict[str, float]:
        """Seconds by op, longest first; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for name, taken in self._spans:
            total[name] = total.get(name, 0.0) + taken()
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def calls(self) -> dict[str, int]:
        """Calls by op."""
        names = [name for name, _ in self._spans]
        return {name: names.count(name) for name in dict.fromkeys(names)}


def group_of(name: str) -> str:
    """The group that an operation counts in: ``"happyhorse_fast::qkv_linear_reference"`` in ``"qkv_linear"``."""
    if name.startswith(PACKAGE):
        return name.removeprefix(PACKAGE).removesuffix("_reference").removesuffix("_cuda")
    base = name.removeprefix("aten::")
    if base in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm"):
        return PRODUCTS
    return ATTENTION if base.startswith("_scaled_dot_product") else OTHER
