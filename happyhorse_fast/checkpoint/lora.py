"""LoRAs of files merged into a model's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from happyhorse_fast.checkpoint.lora_file import Lora, read_lora
from happyhorse_fast.eager.lora import Update, merge
from happyhorse_fast.fast.refusals import require_unwrapped, require_whole_weights
from happyhorse_fast.fast.state import is_accelerated

Model = TypeVar("Model", bound=nn.Module)


def merge_lora(model: Model, lora: Lora | Sequence[Lora], scale: float | Sequence[float] = 1.0) -> Model:
    """Add LoRAs to a model's weights, in place, before it is accelerated.

    A weight becomes W + scale * alpha / r * (up @ down), in float32, rounded once to its dtype. Several LoRAs are added
    in order, in one call or in several: every weight is made anew from the original and all of them, and rounded once.
    ``restore(model)`` takes them all out, also after ``accelerate(model)``. The original weights are kept on the CPU
    for that (30 GB where a 15B model is merged whole), and freed with its layers by ``FastConfig(originals="drop")``.

    Args:
        model: A :class:`HappyHorse` or a model object of the public implementation, not accelerated.
        lora: A folder or ``.safetensors`` file, or tensors by key, in the style of peft
            (``base_model.model.<path>.lora_A.weight``, with ``adapter_config.json``), diffusers
            (``transformer.<path>.lora_A.weight`` or ``.lora.down.weight``) or kohya
            (``lora_unet_<path>.lora_down.weight``). ``<path>`` is a module with a matrix, such as
            ``block.layers.0.attention.linear_qkv``; up is [out features, r], of three experts [3 * out features, r].
            Where nothing says alpha, it is the rank, and ``scale`` the whole factor. Or a list of such.
        scale: Strength; may be negative. Of several, one for all or one each.

    Returns:
        ``model`` itself. On any error its weights are what they were.

    Raises:
        CheckpointError: A file is missing or damaged.
        TypeError: ``model`` is no module or wraps one; ``lora`` or ``scale`` is of another type.
        ValueError: The model is accelerated; keys that fit no module, shapes or ranks that do not fit, methods other
            than LoRA, NaN or Inf, or weights changed since an earlier merge. The message names the keys.
    """
    require_unwrapped(model)
    if is_accelerated(model):
        raise ValueError(
            "model must not be accelerated, its weights are packed: call restore(model) (which takes out LoRAs merged "
            "before), merge_lora, then accelerate(model); or load(..., lora=...)"
        )
    require_whole_weights(model)
    updates = plan_updates(model, lora, scale)
    if meta := next((path for path in updates if model.get_submodule(path).weight.is_meta), None):
        raise ValueError(f"model must hold data, {meta}.weight is on the meta device")
    merge(model, updates)
    return model


def plan_updates(
    model: nn.Module, lora: Lora | Sequence[Lora], scale: float | Sequence[float]
) -> dict[str, list[Update]]:
    """The updates of LoRAs by module path, held against the model's shapes; the model may be on ``"meta"``.

    Raises:
        CheckpointError, TypeError, ValueError: As :func:`merge_lora`.
    """
    modules = {path: module for path, module in model.named_modules() if path and _matrix(module) is not None}
    count = Counter(id(_matrix(module)) for module in modules.values())
    updates: dict[str, list[Update]] = {}
    loras: list[Any] = list(lora) if isinstance(lora, list | tuple) else [lora]
    scales: list[Any] = list(scale) if isinstance(scale, list | tuple) else [scale] * len(loras)
    if len(scales) != len(loras):
        raise ValueError(f"scale must be one number or one for each of the {len(loras)} LoRAs, got {len(scales)}")
    for one, strength in zip(loras, scales, strict=True):
        for update in read_lora(one, strength, modules):
            weight = _matrix(modules[update.path])
            assert weight is not None
            if count[id(weight)] > 1:
                raise ValueError(f"{update.source}: {update.path}.weight is tied to another module's: untie it first")
            if (update.up.shape[0], update.down.shape[1]) != weight.shape:
                raise ValueError(
                    f"{update.source}: the LoRA for {update.path} must be for [out, in] features "
                    f"{list(weight.shape)}, got {[update.up.shape[0], update.down.shape[1]]}"
                )
            updates.setdefault(update.path, []).append(update)
    return updates


def _matrix(module: nn.Module) -> torch.Tensor | None:
    """A module's weight, where a LoRA can be for it and it is a parameter of its own."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 and not parametrize.is_parametrized(module) else None
