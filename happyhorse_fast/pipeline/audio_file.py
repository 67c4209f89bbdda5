"""Where Stable Audio's codec lies in a folder, in either layout in which it is published, by the library's keys."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.header import DIFFUSERS_FILE, SINGLE_FILE, TensorEntry, read_file, read_headers
from happyhorse_fast.pipeline.codec_files import CONFIG, read_json, require_settings
from happyhorse_fast.pipeline.sound import LATENT_SAMPLES

WHAT = "Stable Audio's codec"
AUDIO_CHANNELS = 64
"""Of a latent."""
CHANNELS = 2
"""Of the sound."""
RATIOS = [2, 4, 4, 8, 8]
"""Of the published codec: how many samples or features each of its blocks makes one of."""
ROOT_CONFIG = "model_config.json"
ROOT_PREFIX = "pretransform.model."
"""Of the codec's keys in the whole model of Stable Audio Open."""


def describe(folder: Path) -> tuple[Path, dict[str, Any], dict[str, TensorEntry]]:
    """Find the codec in a folder; no weights are read.

    Args:
        folder: As :meth:`~happyhorse_fast.pipeline.audio.AudioCodec.load` takes it.

    Returns:
        (what messages name, the library's config, the entries by the library's keys).

    Raises:
        CheckpointError: A file is missing, truncated or of another model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    for place in (folder, folder / "vae"):
        if (place / CONFIG).exists():
            settings = read_json(place / CONFIG)
            require_settings(place / CONFIG, settings, {"_class_name": "AutoencoderOobleck"}, WHAT)
            break
    else:
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{folder}: holds neither {CONFIG} and {DIFFUSERS_FILE} nor vae/{CONFIG}, nor {SINGLE_FILE} of the "
                "whole model"
            )
        place = folder / SINGLE_FILE
        settings = _root_settings(folder / ROOT_CONFIG)
    wanted = {"decoder_input_channels": AUDIO_CHANNELS, "audio_channels": CHANNELS}
    require_settings(place, {**wanted, **settings}, wanted, WHAT)  # what a config leaves out is the library's default
    ratios = settings.get("downsampling_ratios", RATIOS)
    numbers = isinstance(ratios, list) and all(isinstance(ratio, int) for ratio in ratios)
    if not numbers or math.prod(ratios) != LATENT_SAMPLES:
        raise CheckpointError(
            f"{place}: not of {WHAT}: downsampling_ratios must multiply to {LATENT_SAMPLES} samples a latent, "
            f"got {ratios}"
        )
    return place, settings, _root_entries(place, len(ratios)) if place.is_file() else read_headers(place)


def _root_settings(file: Path) -> dict[str, Any]:
    """The library's config by that of the whole model, whose codec is its ``pretransform``."""
    try:
        inside = read_json(file)["model"]["pretransform"]["config"]
        encoder, decoder = inside["encoder"]["config"], inside["decoder"]["config"]
        said = {f"{half}.{key}": value for half in _BLOCKS for key, value in inside[half]["config"].items()}
        wanted = {
            "encoder.channels": encoder["latent_dim"],  # as the library has it
            "encoder.use_snake": True,
            "decoder.use_snake": True,
            "decoder.final_tanh": False,
            "decoder.c_mults": encoder["c_mults"],
            "decoder.strides": encoder["strides"],
        }
        require_settings(file, said, wanted, WHAT)
        return {
            "encoder_hidden_size": encoder["channels"],
            "downsampling_ratios": encoder["strides"],
            "channel_multiples": encoder["c_mults"],
            "decoder_channels": decoder["channels"],
            "decoder_input_channels": decoder["latent_dim"],
            "audio_channels": decoder["out_channels"],
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not of {WHAT}: model.pretransform.config lacks {error}") from error


_UNIT = ("snake1", "conv1", "snake2", "conv2")
_BLOCKS = {
    "encoder": ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"),
    "decoder": ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"),
}


def _root_entries(file: Path, blocks: int) -> dict[str, TensorEntry]:
    """The codec's entries in the whole model, by the library's keys; what has none keeps its own, to be reported."""
    inside = {
        key.removeprefix(ROOT_PREFIX): entry for key, entry in read_file(file).items() if key.startswith(ROOT_PREFIX)
    }
    if not inside:
        raise CheckpointError(f"{file}: not of {WHAT}: no key starts with {ROOT_PREFIX}")
    names = _library_names(blocks)
    found = {}
    for key, entry in inside.items():
        module, _, tensor = key.rpartition(".")
        name = f"{names[module]}.{tensor}" if module in names else key
        # Snake's two vectors have dimensions for the batch and for time in the library.
        shape = (1, *entry.shape, 1) if tensor in ("alpha", "beta") else entry.shape
        found[name] = dataclasses.replace(entry, key=name, shape=shape)
    return found


def _library_names(blocks: int) -> dict[str, str]:
    """Modules of the codec in the whole model, with so many blocks in either half, and the library's names of them."""
    names = {}
    for half, parts in _BLOCKS.items():
        for place, name in ((0, "conv1"), (blocks + 1, "snake1"), (blocks + 2, "conv2")):
            names[f"{half}.layers.{place}"] = f"{half}.{name}"
        for block, (place, part) in itertools.product(range(blocks), enumerate(parts)):
            here, name = f"{half}.layers.{block + 1}.layers.{place}", f"{half}.block.{block}.{part}"
            names[here] = name
            names |= {f"{here}.layers.{index}": f"{name}.{unit}" for index, unit in enumerate(_UNIT)}
    return names
