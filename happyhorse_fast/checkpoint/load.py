"""Checkpoints in the published format, streamed from disk into a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.header import TensorEntry, read_headers
from happyhorse_fast.checkpoint.lora import Lora, plan_updates
from happyhorse_fast.checkpoint.packed import empty_packed, is_packed, packed_config
from happyhorse_fast.checkpoint.save import save_checkpoint
from happyhorse_fast.checkpoint.stream import assign, emptied_on_error, fill_by_layer
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.lora import Update, add_updates
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.rotary import frequency_bands
from happyhorse_fast.eager.sizes import BANDS_KEY, layer_of, require_sizes
from happyhorse_fast.fast.accelerate import choose_ops, install
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.parallelize import spread
from happyhorse_fast.fast.state import FastState
from happyhorse_fast.ops.runtime.checks import compute_capability

__all__ = ["load", "save_checkpoint"]

# Largest relative difference of stored and computed rotary frequencies; they agree to 2e-7 (float32 powers) at most.
BANDS_TOLERANCE = 1e-6


@ambient.makes_tensors
def load(
    path: str | Path,
    preset: str | None = None,
    config: ModelConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
    fast: FastConfig | None = None,
    lora: Lora | Sequence[Lora] = (),
    lora_scale: float | Sequence[float] = 1.0,
    shard: Any = None,
) -> HappyHorse:
    """Load a checkpoint: in the published format, or packed by :func:`save_packed`.

    Headers are checked before any data are read. Then every tensor is streamed to the device in pieces of 16 MiB,
    straight into the memory and the dtype it stays in: linear weights inside layers in bfloat16, the rest in float32.

    Args:
        path: A folder with ``model.safetensors``, or with shards named by ``model.safetensors.index.json`` (or either
            under diffusers' name, ``diffusion_pytorch_model``); or one ``.safetensors`` file or index. A prefix that
            all keys share, such as ``module.``, is taken off. A folder of packed weights carries its own
            configurations: then ``preset`` and ``config`` must be left out.
        preset: Name of the published configuration that the checkpoint is of; see :meth:`ModelConfig.preset`.
        config: The configuration instead. Exactly one of the two: ``local_attn_layers``, ``frame_receptive_field`` and
            ``coords_style`` cannot be read off the tensors; the sizes that can be are held against it.
        device: Where the weights go.
        compute_dtype: Dtype of products and attention, see :class:`HappyHorse`; with ``fast`` and for packed weights
            bfloat16 alone.
        progress: Show a progress bar on standard error.
        fast: Accelerate as :func:`accelerate` would, layer by layer while loading: one layer's published weights are on
            the device at a time, and they are not kept (so there is no :func:`restore`). Of packed weights it replaces
            what they were saved with: backend, sparsity, where to stay exact; the precision of each product must be
            that of the weights.
        lora: What :func:`merge_lora` takes, merged as there, layer by layer, before a layer is packed. The original
            weights are not kept. Not for packed weights.
        lora_scale: Its ``scale``.
        shard: Device mesh of ``device``'s kind: every rank keeps its share of a layer's matrices as soon as it has the
            layer, so that no device ever holds more than one whole layer; :func:`parallelize` comes after.

    Returns:
        The model, complete: on any error, Ctrl-C included, there is none, and its memory is free again.

    Raises:
        CheckpointError: As :func:`read_headers`; missing, unexpected or misshapen tensors, tensors that are not
            floating point, sizes other than the configuration's, NaN or Inf in a tensor, or rotary frequencies that are
            not the model's. The message names files and keys.
        TypeError: ``config`` is not a ModelConfig.
        ValueError: Not exactly one of ``preset`` and ``config``; no such preset, device or compute dtype; ``fast`` asks
            for another precision than packed weights have; ``lora`` for packed weights, or one that does not fit;
            ``shard`` is a mesh of another kind of device.
    """
    place = usable_device(device)
    if shard is not None and shard.device_type != place.type:
        raise ValueError(f"shard must be a mesh of {place.type} devices, as device is; got {shard.device_type}")
    wanted = check_load(path, preset, config, compute_dtype=compute_dtype, fast=fast)
    packed = is_packed(path)
    state: FastState | None = None
    updates: dict[str, list[Update]] = {}
    if packed:
        if lora:
            raise ValueError(
                f"lora must be left out: the folder {str(path)!r} is packed; load the published checkpoint"
            )
        model, entries = empty_packed(Path(path), place, fast)
    else:
        model, entries = HappyHorse(wanted, compute_dtype, device="meta"), read_headers(path)
        updates = plan_updates(model, lora, lora_scale)
        if fast is not None:
            state = FastState(wanted, fast, choose_ops(fast.on(compute_capability(place)), place, None))
    layers: Any = model.block.layers

    def done(layer: int | None) -> None:
        for path in (path for path in updates if layer_of(path) == layer):
            add_updates(model.get_submodule(path), updates[path])
        if layer is None:
            if packed:
                cast("FastState", model.fast).take_bands(model.adapter.rope.bands)
            else:
                _check_bands(model, entries.get(BANDS_KEY), place)
            return
        if packed:
            layers[layer].find_bound()
        elif state is not None:
            layers[layer] = state.pack(layer, layers[layer].state_dict(), place)
        if shard is not None:
            spread(layers[layer], shard)

    with emptied_on_error(model):
        fill_by_layer(model, entries.values(), place, done, progress=progress)
        if state is not None:
            install(model, state)
    return model


def check_load(
    path: str | Path,
    preset: str | None,
    config: ModelConfig | None,
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    fast: FastConfig | None = None,
) -> ModelConfig:
    """Make the checks of :func:`load` that need no data; arguments and errors as there.

    Returns:
        The configuration that the model would have.
    """
    if fast is not None and not isinstance(fast, FastConfig):
        raise TypeError(f"fast must be a FastConfig, got {type(fast).__name__}")
    packed = is_packed(path)
    if packed and (preset is not None or config is not None):
        raise ValueError(f"preset and config must be left out: the folder {str(path)!r} is packed and carries its own")
    if (packed or fast is not None) and compute_dtype != torch.bfloat16:
        raise ValueError(
            "compute_dtype must be torch.bfloat16 with fast=... and for packed weights, whose products are in bf16, "
            f"int8 or fp8; got {compute_dtype}"
        )
    if packed:
        return packed_config(path, fast)[0]
    if (preset is None) == (config is None):
        raise ValueError(
            f"exactly one of preset and config is required, got {'neither' if preset is None else 'both'}: "
            "local_attn_layers, frame_receptive_field and coords_style cannot be read off a checkpoint's tensors, and "
            f"a wrong guess would be silent. Presets: {', '.join(ModelConfig.preset_names())}"
        )
    wanted = ModelConfig.preset(str(preset)) if config is None else config
    if not isinstance(wanted, ModelConfig):
        raise TypeError(f"config must be a ModelConfig, got {type(config).__name__}")
    if fast is not None:
        fast.require_model(wanted)
    require_sizes(read_headers(path), Path(path), wanted, f"preset {preset!r}" if config is None else "config")
    return wanted


def usable_device(device: torch.device | str) -> torch.device:
    """The device by its full name.

    Raises:
        ValueError: This machine does not have it, or it holds no data.
    """
    try:
        place = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise ValueError(f"device must be one that this machine has, got {str(device)!r}: {error}") from error
    if place.type == "meta":
        raise ValueError("device must be one that holds data, got 'meta'")
    return place


def _check_bands(model: HappyHorse, entry: TensorEntry | None, device: torch.device) -> None:
    """Hold the rotary frequencies that were read against the model's; set them where there were none."""
    bands = frequency_bands(model.config.head_dim)
    if entry is None:
        assign(model, BANDS_KEY, bands.to(device))
        return
    error = float(((model.adapter.rope.bands.cpu() - bands) / bands).abs().max())
    if error > BANDS_TOLERANCE:
        raise CheckpointError(
            f"{entry.file}: {BANDS_KEY} differs from the model's rotary frequencies 10000^(-i/{len(bands)}) by a "
            f"relative {error:.1e}, more than {BANDS_TOLERANCE:.0e}: the checkpoint is of another model"
        )
