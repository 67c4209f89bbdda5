"""A joint audio-video diffusion Transformer: the eager reference, and kernels that are checked against it.

Names are imported on first use: ``import happyhorse_fast`` needs neither Triton nor a GPU and loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from happyhorse_fast import moved
from happyhorse_fast._version import __version__

if TYPE_CHECKING:
    from happyhorse_fast import hosts
    from happyhorse_fast.arguments import CheckpointError, NonFiniteError
    from happyhorse_fast.block_map import BlockMap, Layout
    from happyhorse_fast.checkpoint.load import load, save_checkpoint
    from happyhorse_fast.checkpoint.lora import merge_lora
    from happyhorse_fast.checkpoint.packed import save_packed
    from happyhorse_fast.config import ModelConfig
    from happyhorse_fast.eager.model import HappyHorse
    from happyhorse_fast.fast.accelerate import Explanation, accelerate, explain, restore
    from happyhorse_fast.fast.config import FastConfig, Tiles, TopK, TopP
    from happyhorse_fast.fast.parallelize import parallelize
    from happyhorse_fast.fast.step import at_step
    from happyhorse_fast.ops.attention.sdpa import attention
    from happyhorse_fast.ops.runtime.obstacles import BackendError
    from happyhorse_fast.parallel.clips import clips_of_rank
    from happyhorse_fast.pipeline.pipeline import Pipeline
    from happyhorse_fast.sampler.sample import sample
    from happyhorse_fast.sampler.super_resolve import super_resolve
    from happyhorse_fast.tokens import ClipTokens, tokens_for

moved.tell()
_WHERE = {
    "BackendError": "ops.runtime.obstacles",
    "BlockMap": "block_map",
    "CheckpointError": "arguments",
    "ClipTokens": "tokens",
    "Explanation": "fast.accelerate",
    "FastConfig": "fast.config",
    "HappyHorse": "eager.model",
    "Layout": "block_map",
    "ModelConfig": "config",
    "NonFiniteError": "arguments",
    "Pipeline": "pipeline.pipeline",
    "Tiles": "fast.config",
    "TopK": "fast.config",
    "TopP": "fast.config",
    "accelerate": "fast.accelerate",
    "at_step": "fast.step",
    "clips_of_rank": "parallel.clips",
    "attention": "ops.attention.sdpa",
    "explain": "fast.accelerate",
    "hosts": "",
    "load": "checkpoint.load",
    "merge_lora": "checkpoint.lora",
    "parallelize": "fast.parallelize",
    "restore": "fast.accelerate",
    "sample": "sampler",
    "save_checkpoint": "checkpoint.load",
    "save_packed": "checkpoint.packed",
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
    "Pipeline",
    "Tiles",
    "TopK",
    "TopP",
    "__version__",
    "accelerate",
    "at_step",
    "attention",
    "clips_of_rank",
    "explain",
    "hosts",
    "load",
    "merge_lora",
    "parallelize",
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
    if not _WHERE[name]:  # a part of its own
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
