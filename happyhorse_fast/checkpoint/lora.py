"""LoRAs merged into a model's weights, exactly, and taken out again bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from happyhorse_fast import ambient
from happyhorse_fast.checkpoint.lora_file import Lora, Update, read_lora
from happyhorse_fast.fast.refusals import require_unwrapped, require_whole_weights
from happyhorse_fast.fast.state import is_accelerated

Model = TypeVar("Model", bound=nn.Module)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Merged:
    """What a module whose weight has LoRAs in it remembers.

    Attributes:
        original: The weight before, on the CPU.
        updates: What was added, in order.
        bits: Column sums of the merged weight's bits: another weight is not taken for it.
    """

    original: torch.Tensor
    updates: tuple[Update, ...]
    bits: torch.Tensor


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
    require_whole_weights(model)
    if is_accelerated(model):
        raise ValueError(
            "model must not be accelerated, its weights are packed: call restore(model) (which takes out LoRAs merged "
            "before), merge_lora, then accelerate(model); or load(..., lora=...)"
        )
    updates = plan_updates(model, lora, scale)
    if meta := next((path for path in updates if model.get_submodule(path).weight.is_meta), None):
        raise ValueError(f"model must hold data, {meta}.weight is on the meta device")
    before: dict[str, Merged | None] = {}
    try:
        for path in updates:
            module = model.get_submodule(path)
            before[path] = merged = _merged(module, path)
            _write(module, merged, (*(merged.updates if merged else ()), *updates[path]), path)
    except BaseException:  # not finite, out of memory, Ctrl-C
        for path, merged in before.items():
            _rewrite(model.get_submodule(path), merged)
        raise
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


def add_updates(module: nn.Module, updates: Iterable[Update]) -> None:
    """Add LoRAs to a weight for good, as :func:`merge_lora` does.

    Raises:
        ValueError: NaN or Inf would be in it.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    _copy(weight, _sum(weight, tuple(updates), weight.device))


def unmerge(model: nn.Module) -> bool:
    """Take out every LoRA that :func:`merge_lora` merged; whether there was one.

    Raises:
        ValueError: A merged weight was changed since; nothing is taken out then.
    """
    merged = {path: _merged(module, path) for path, module in model.named_modules() if "merged_lora" in vars(module)}
    for path in merged:
        _rewrite(model.get_submodule(path), None)
    return bool(merged)


def _matrix(module: nn.Module) -> torch.Tensor | None:
    """A module's weight, where a LoRA can be for it and it is a parameter of its own."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 and not parametrize.is_parametrized(module) else None


def _merged(module: nn.Module, path: str) -> Merged | None:
    """What is merged into a module's weight, which must not have changed since."""
    merged: Merged | None = vars(module).get("merged_lora")
    if merged is None:
        return None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if weight.shape != merged.original.shape or not torch.equal(_bits(weight.to(merged.original.dtype)), merged.bits):
        raise ValueError(
            f"{path}.weight was changed after merge_lora(model, ...), so that its LoRAs can be neither taken out "
            "nor added to: load the checkpoint into a new model"
        )
    return merged


def _write(module: nn.Module, merged: Merged | None, updates: tuple[Update, ...], path: str) -> None:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    original = merged.original if merged else weight.detach().to("cpu", copy=True)
    value = _sum(original, updates, weight.device)
    module.merged_lora = Merged(original, updates, _bits(value))  # type: ignore[assignment]
    _copy(weight, value)


def _rewrite(module: nn.Module, merged: Merged | None) -> None:
    """Give a module the weight that it had with ``merged`` in it, None for its original."""
    now: Merged | None = vars(module).get("merged_lora")
    if now is merged:
        return  # not written yet, or there was nothing
    assert now is not None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    _copy(weight, _sum(now.original, merged.updates, weight.device) if merged else now.original)
    if merged:
        module.merged_lora = merged  # type: ignore[assignment]
    else:
        del module.merged_lora


def _copy(weight: torch.Tensor, value: torch.Tensor) -> None:
    # A model made in inference mode can be written to in that mode alone.
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.copy_(value)


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().view(_BITS[weight.dtype.itemsize]).sum(0, dtype=torch.int64).cpu()


def _sum(original: torch.Tensor, updates: tuple[Update, ...], device: torch.device) -> torch.Tensor:
    """original [out, in] plus its updates, summed in float32 (float64 for float64) in order, in its own dtype."""
    wide = torch.promote_types(original.dtype, torch.float32)
    with ambient.held(), torch.no_grad():  # products in float32, whatever the process is set to
        total = original.detach().to(device, wide, copy=True)
        for update in updates:
            up, down = update.up.to(device, wide), update.down.to(device, wide)
            total += (up @ down).mul_(update.factor)
        value = total.to(original.dtype)
    if not all(bool(torch.isfinite(extreme)) for extreme in value.aminmax()):
        last = updates[-1]
        raise ValueError(f"{last.source}: {last.path}.weight would hold NaN or Inf with a factor of {last.factor:g}")
    return value
