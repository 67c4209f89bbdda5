"""What the ranks of a :mod:`rank_pool` run; importable by them without pytest."""

from __future__ import annotations

from typing import Any

import torch
from small_models import CONFIG, PublicLayout, clip, packed
from torch.distributed.device_mesh import init_device_mesh

import happyhorse_fast as hh
from happyhorse_fast import golden
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.config import FastConfig


def config_of(heads: int = 2, **changes: Any) -> ModelConfig:
    """A model of ``heads`` key/value heads with two query heads each: a sandwich layer and a shared one."""
    sizes = {"hidden_size": 64, "num_heads_q": 2 * heads, "num_heads_kv": heads}
    return CONFIG.replace(**sizes, **changes)


def model_of(config: ModelConfig, fast: FastConfig | None, public: bool = False, **eager: Any) -> Any:
    model: torch.nn.Module = HappyHorse(config, **eager)
    model.load_state_dict(golden.recipe_weights(config, 3))
    if public:
        model = PublicLayout(model)
    return model if fast is None else hh.accelerate(model, fast)


def outputs(model: Any, inputs: tuple[Any, ...]) -> list[Any]:
    with torch.no_grad():
        result = model(*inputs)
    return [x.numpy() for x in ([result] if isinstance(result, torch.Tensor) else result)]


def alone_and_together(
    rank: int,
    ranks: int,
    config: ModelConfig,
    fast: FastConfig | None,
    sizes: tuple[int, ...],
    public: bool = False,
    **eager: Any,
) -> tuple[Any, Any, Any]:
    """One process's outputs (on rank 0), this rank's, and again."""
    inputs = clip(*sizes)
    if public:
        inputs = packed(inputs)
    model = model_of(config, fast, public, **eager)
    alone = outputs(model, inputs) if rank == 0 else None
    hh.parallelize(model, init_device_mesh("cpu", (ranks,)), timeout=30)
    together, again = outputs(model, inputs), outputs(model, inputs)
    return alone, together, again
