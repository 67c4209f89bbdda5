"""Fused kernels for a single-stream joint audio-video diffusion Transformer, and the eager model they are checked against.

Names are imported on first use, so ``import happyhorse_fast`` needs neither Triton nor a GPU and loads only torch's
absence of surprises: nothing heavy until it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from happyhorse_fast._version import __version__

if TYPE_CHECKING:
    from happyhorse_fast.config import ModelConfig
    from happyhorse_fast.model.checkpoint import load
    from happyhorse_fast.reference.model import HappyHorse
    from happyhorse_fast.sampler import sample, super_resolve
    from happyhorse_fast.tokens import ClipTokens, tokens_for

_WHERE = {
    "ClipTokens": "happyhorse_fast.tokens",
    "HappyHorse": "happyhorse_fast.reference.model",
    "ModelConfig": "happyhorse_fast.config",
    "load": "happyhorse_fast.model.checkpoint",
    "sample": "happyhorse_fast.sampler",
    "super_resolve": "happyhorse_fast.sampler",
    "tokens_for": "happyhorse_fast.tokens",
}

__all__ = [
    "ClipTokens",
    "HappyHorse",
    "ModelConfig",
    "__version__",
    "load",
    "sample",
    "super_resolve",
    "tokens_for",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
