"""Where Stable Audio's codec lies in a folder, in either layout in which it is published, by the library's keys."""

from __future__ import annotations

import dataclasses
import math
import re
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
            entries = read_headers(place)
            break
    else:
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{folder}: holds neither {CONFIG} and {DIFFUSERS_FILE} nor vae/{CONFIG}, nor {SINGLE_FILE} of the "
                "whole model"
            )
        place = folder / SINGLE_FILE
        settings = _root_settings(folder / ROOT_CONFIG)
        entries = _root_entries(place)
    wanted = {"decoder_input_channels": AUDIO_CHANNELS, "audio_channels": CHANNELS}
    require_settings(place, {**wanted, **settings}, wanted, WHAT)  # what a config leaves out is the library's default
    ratios = settings.get("downsampling_ratios", RATIOS)
    numbers = isinstance(ratios, list) and all(isinstance(ratio, int) for ratio in ratios)
    if not numbers or math.prod(ratios) != LATENT_SAMPLES:
        raise CheckpointError(
            f"{place}: not of {WHAT}: downsampling_ratios must multiply to {LATENT_SAMPLES} samples a latent, "
            f"got {ratios}"
        )
    return place, settings, entries


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
_ROOT_KEY = re.compile(r"(?P<half>encoder|decoder)\.layers\.(?P<place>\d+)\.(?P<rest>.*)")
_BLOCK_KEY = re.compile(r"layers\.(?P<place>\d+)\.(?:layers\.(?P<unit>\d+)\.)?(?P<name>\w+)")


def _root_entries(file: Path) -> dict[str, TensorEntry]:
    """The codec's entries in the whole model, by the library's keys."""
    inside = {
        key.removeprefix(ROOT_PREFIX): entry for key, entry in read_file(file).items() if key.startswith(ROOT_PREFIX)
    }
    if not inside:
        raise CheckpointError(f"{file}: not of {WHAT}: no key starts with {ROOT_PREFIX}")
    last = {
        half: max(
            (int(m["place"]) for key in inside if (m := _ROOT_KEY.fullmatch(key)) and m["half"] == half), default=0
        )
        for half in _BLOCKS
    }
    found = {}
    for key, entry in inside.items():
        name = _library_key(key, last)
        # Snake's two vectors have dimensions for the batch and for time in the library.
        shape = (1, *entry.shape, 1) if name.endswith((".alpha", ".beta")) else entry.shape
        found[name] = dataclasses.replace(entry, key=name, shape=shape)
    return found


def _library_key(key: str, last: dict[str, int]) -> str:
    """A key of the whole model in the library's words; as it is, to be reported, where it has none."""
    outer = _ROOT_KEY.fullmatch(key)
    if outer is None:
        return key
    half, place = outer["half"], int(outer["place"])
    ends = {0: "conv1", last[half] - 1: "snake1", last[half]: "conv2"}
    if place in ends:
        return f"{half}.{ends[place]}.{outer['rest']}"
    inner = _BLOCK_KEY.fullmatch(outer["rest"])
    names = _BLOCKS[half]
    if inner is None or int(inner["place"]) >= len(names) or int(inner["unit"] or 0) >= len(_UNIT):
        return key
    unit = "" if inner["unit"] is None else f"{_UNIT[int(inner['unit'])]}."
    return f"{half}.block.{place - 1}.{names[int(inner['place'])]}.{unit}{inner['name']}"
