"""Where people already run models: this package's attention in PyTorch's place, diffusers, ComfyUI, vLLM-Omni, kernels.

Each module is of one host, thin, and imports it only when it is used; docs/HOSTS.md has the line to write for each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import happyhorse_fast.hosts.comfyui as comfyui
    import happyhorse_fast.hosts.diffusers as diffusers
    from happyhorse_fast.hosts.calls import Calls
    from happyhorse_fast.hosts.sparse import Chosen
    from happyhorse_fast.hosts.torch import sdpa

__all__ = ["Calls", "Chosen", "comfyui", "diffusers", "sdpa"]
_WHERE = {"Calls": "calls", "Chosen": "sparse", "sdpa": "torch"}


def __getattr__(name: str) -> Any:
    if name in ("comfyui", "diffusers"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
