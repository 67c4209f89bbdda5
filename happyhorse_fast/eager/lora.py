"""LoRAs in a model's weights: added exactly, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from happyhorse_fast import ambient

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Update:
    """The product that a LoRA adds to one weight: ``factor * up @ down``.

    Attributes:
        path: The module whose weight it is for.
        down: [r, in features], on the CPU.
        up: [out features, r]; of a weight of several experts, their rows one after another.
        factor: scale * alpha / r (alpha / sqrt(r) for rank-stabilised ones).
        source: Where it is from, for messages.
    """

    path: str
    down: torch.Tensor
    up: torch.Tensor
    factor: float
    source: str


@dataclass
class Merged:
    """Record of a module whose weight has LoRAs in it.

    Attributes:
        original: The weight before, on the CPU.
        updates: What was added, in order.
        bits: Column sums of the merged weight's bits: another weight is not taken for it.
    """

    original: torch.Tensor
    updates: tuple[Update, ...]
    bits: torch.Tensor


def merge(model: nn.Module, updates: Mapping[str, Sequence[Update]]) -> None:
    """Add LoRAs by module path to a model's weights; on any error its weights are what they were.

    Raises:
        ValueError: NaN or Inf would be in a weight, or one was changed since an earlier merge.
    """
    before: dict[str, Merged | None] = {}
    try:
        for path in updates:
            module = model.get_submodule(path)
            before[path] = merged = _merged(module, path)
            _write(module, (*(merged.updates if merged else ()), *updates[path]))
    except BaseException:  # not finite, out of memory, Ctrl-C
        for path, merged in before.items():
            module = model.get_submodule(path)
            if vars(module).get("merged_lora") is not merged:  # else it was not written yet
                _write(module, merged.updates if merged else ())
        raise


def add_updates(module: nn.Module, updates: Iterable[Update]) -> None:
    """Add LoRAs to a weight for good, as :func:`merge` does.

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
        _write(model.get_submodule(path), ())
    return bool(merged)


def _merged(module: nn.Module, path: str) -> Merged | None:
    """The record of LoRAs in a module's weight, which must not have changed since; None where there are none."""
    merged: Merged | None = vars(module).get("merged_lora")
    if merged is None:
        return None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if weight.shape == merged.original.shape:
        bits = _bits(weight.to(merged.original.dtype))
        if torch.equal(bits, merged.bits):
            return merged
        if torch.equal(bits, _bits(merged.original)):  # Ctrl-C came before its record went, or it was loaded again
            del module.merged_lora
            return None
    raise ValueError(
        f"{path}.weight was changed after merge_lora(model, ...), so that its LoRAs can be neither taken out "
        "nor added to: load the checkpoint into a new model"
    )


def _write(module: nn.Module, updates: tuple[Update, ...]) -> None:
    """Make a module's weight of its original and these LoRAs; of none, it is the original, and its record goes."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    merged: Merged | None = vars(module).get("merged_lora")
    original = merged.original if merged else weight.detach().to("cpu", copy=True)
    if updates:
        value = _sum(original, updates, weight.device)
        module.merged_lora = Merged(original, updates, _bits(value))  # type: ignore[assignment]
        _copy(weight, value)
    elif merged:
        _copy(weight, original)
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
