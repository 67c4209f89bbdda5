"""A joint audio-video diffusion Transformer: the eager reference, and kernels that are checked against it.

Names are imported on first use: ``import happyhorse_fast`` needs neither Triton nor a GPU and loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from happyhorse_fast import moved
from happyhorse_fast._version import __version__ as __version__

if TYPE_CHECKING:
    from happyhorse_fast import hosts as hosts
    from happyhorse_fast.arguments import CheckpointError as CheckpointError
    from happyhorse_fast.arguments import NonFiniteError as NonFiniteError
    from happyhorse_fast.block_map import BlockMap as BlockMap
    from happyhorse_fast.block_map import Layout as Layout
    from happyhorse_fast.checkpoint.load import load as load
    from happyhorse_fast.checkpoint.load import save_checkpoint as save_checkpoint
    from happyhorse_fast.checkpoint.lora import merge_lora as merge_lora
    from happyhorse_fast.checkpoint.packed import save_packed as save_packed
    from happyhorse_fast.config import ModelConfig as ModelConfig
    from happyhorse_fast.eager.model import HappyHorse as HappyHorse
    from happyhorse_fast.fast.accelerate import Explanation as Explanation
    from happyhorse_fast.fast.accelerate import accelerate as accelerate
    from happyhorse_fast.fast.accelerate import explain as explain
    from happyhorse_fast.fast.accelerate import restore as restore
    from happyhorse_fast.fast.config import FastConfig as FastConfig
    from happyhorse_fast.fast.config import Tiles as Tiles
    from happyhorse_fast.fast.config import TopK as TopK
    from happyhorse_fast.fast.config import TopP as TopP
    from happyhorse_fast.fast.parallelize import parallelize as parallelize
    from happyhorse_fast.fast.step import at_step as at_step
    from happyhorse_fast.ops.attention.sdpa import attention as attention
    from happyhorse_fast.ops.runtime.obstacles import BackendError as BackendError
    from happyhorse_fast.parallel.clips import clips_of_rank as clips_of_rank
    from happyhorse_fast.pipeline.pipeline import Pipeline as Pipeline
    from happyhorse_fast.sampler.sample import sample as sample
    from happyhorse_fast.sampler.super_resolve import super_resolve as super_resolve
    from happyhorse_fast.tokens import ClipTokens as ClipTokens
    from happyhorse_fast.tokens import tokens_for as tokens_for

moved.tell()
_MODULES = {
    "arguments": "CheckpointError NonFiniteError",
    "block_map": "BlockMap Layout",
    "checkpoint.load": "load save_checkpoint",
    "checkpoint.lora": "merge_lora",
    "checkpoint.packed": "save_packed",
    "config": "ModelConfig",
    "eager.model": "HappyHorse",
    "fast.accelerate": "Explanation accelerate explain restore",
    "fast.config": "FastConfig Tiles TopK TopP",
    "fast.parallelize": "parallelize",
    "fast.step": "at_step",
    "ops.attention.sdpa": "attention",
    "ops.runtime.obstacles": "BackendError",
    "parallel.clips": "clips_of_rank",
    "pipeline.pipeline": "Pipeline",
    "sampler": "sample super_resolve",
    "tokens": "ClipTokens tokens_for",
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted([*_WHERE, "__version__", "hosts"])


def __getattr__(name: str) -> Any:
    if name == "hosts":  # a part of its own
        return importlib.import_module(f"{__name__}.hosts")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
