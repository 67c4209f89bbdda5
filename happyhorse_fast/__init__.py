"""A joint audio-video diffusion Transformer: the eager reference, and kernels that are checked against it.

Names are imported on first use: ``import happyhorse_fast`` needs neither Triton nor a GPU and loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from happyhorse_fast._version import __version__

if TYPE_CHECKING:
    from happyhorse_fast.block_map import BlockMap, Layout
    from happyhorse_fast.config import ModelConfig
    from happyhorse_fast.errors import CheckpointError, NonFiniteError
    from happyhorse_fast.model.accelerate import Explanation, accelerate, explain, restore
    from happyhorse_fast.model.checkpoint import load, save_checkpoint
    from happyhorse_fast.model.fast_config import FastConfig, Tiles, TopK, TopP
    from happyhorse_fast.model.lora import merge_lora
    from happyhorse_fast.model.packed_checkpoint import save_packed
    from happyhorse_fast.model.step import at_step
    from happyhorse_fast.ops.dispatch import BackendError
    from happyhorse_fast.ops.sdpa import attention
    from happyhorse_fast.reference.model import HappyHorse
    from happyhorse_fast.sampler.sample import sample
    from happyhorse_fast.sampler.super_resolve import super_resolve
    from happyhorse_fast.tokens import ClipTokens, tokens_for

_WHERE = {
    "BackendError": "ops.dispatch",
    "BlockMap": "block_map",
    "CheckpointError": "errors",
    "ClipTokens": "tokens",
    "Explanation": "model.accelerate",
    "FastConfig": "model.fast_config",
    "HappyHorse": "reference.model",
    "Layout": "block_map",
    "ModelConfig": "config",
    "NonFiniteError": "errors",
    "Tiles": "model.fast_config",
    "TopK": "model.fast_config",
    "TopP": "model.fast_config",
    "accelerate": "model.accelerate",
    "at_step": "model.step",
    "attention": "ops.sdpa",
    "explain": "model.accelerate",
    "load": "model.checkpoint",
    "merge_lora": "model.lora",
    "restore": "model.accelerate",
    "sample": "sampler",
    "save_checkpoint": "model.checkpoint",
    "save_packed": "model.packed_checkpoint",
    "super_resolve": "sampler",
    "tokens_for": "tokens",
}

__all__ = [
    "BackendError",
    "BlockMap",
    "CheckpointError",
    "ClipTokens",
    "Explanation",
    "FastConfig",
    "HappyHorse",
    "Layout",
    "ModelConfig",
    "NonFiniteError",
    "Tiles",
    "TopK",
    "TopP",
    "__version__",
    "accelerate",
    "at_step",
    "attention",
    "explain",
    "load",
    "merge_lora",
    "restore",
    "sample",
    "save_checkpoint",
    "save_packed",
    "super_resolve",
    "tokens_for",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
