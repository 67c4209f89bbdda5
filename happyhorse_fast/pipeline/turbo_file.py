"""The turbo decoder as it is published: settings in a JSON file, weights in a pickle of torch's."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import CheckpointError, NonFiniteError, listed, require_finite
from happyhorse_fast.checkpoint.header import require_regular_file
from happyhorse_fast.checkpoint.load import usable_device
from happyhorse_fast.config import LATENT_CHANNELS
from happyhorse_fast.pipeline.codec_files import read_json, require_settings
from happyhorse_fast.pipeline.frame_stream import SHORTCUT_EPS
from happyhorse_fast.pipeline.tiling import SPACE_SCALE, STRIDE, TIME_SCALE
from happyhorse_fast.pipeline.turbo import PATCH, SCALES, TurboDecoder

WHAT = "the turbo decoder"
SETTINGS_FILE, WEIGHTS_FILE = "TurboV3-Wan22-TinyShallow_7_7.json", "checkpoint-340000.ckpt"
"""Published names; a folder with one file of each suffix under another name will do."""
EMA = "ema_state_dict"
# Lists are in the order of an encoder: the finest block first.
SETTINGS = {
    "latent_channels": LATENT_CHANNELS,
    "out_channels": 3,
    "patch_size": PATCH,
    "patch_size_t": 1,
    "use_unpatchify": True,
    "decoder_spatio_temporal_scaling": [space for space, _ in reversed(SCALES)],
    "decoder_spatio_only": [space and not time for space, time in reversed(SCALES)],
    "decoder_is_dw_conv": [False] * (len(SCALES) + 1),
    "decoder_causal": False,
    "resnet_norm_eps": SHORTCUT_EPS,
    "temporal_compression_ratio": TIME_SCALE,
    "spatial_compression_ratio": SPACE_SCALE,
    "first_chunk_size": STRIDE,
    "step_size": STRIDE,
}
"""What the decoder is, in the settings' words."""
DEFAULTS = {
    "out_channels": 3,
    "patch_size_t": 1,
    "decoder_is_dw_conv": [False] * (len(SCALES) + 1),
    "decoder_causal": False,
    "resnet_norm_eps": 1e-6,
    "temporal_compression_ratio": 4,
    "spatial_compression_ratio": 16,
}
"""What the published code takes where the settings leave it out; its other defaults are of other decoders."""


@ambient.makes_tensors
def load_turbo(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> TurboDecoder:
    """Load the folder ``turbo_vae``; the decoder's averaged weights alone are read, straight to the device.

    Args:
        folder: With the settings (JSON) and the weights (``.ckpt``, read without running code it may carry).
        device: Where the weights go.
        dtype: Of weights, arithmetic and frames; the published code's by default.

    Raises:
        CheckpointError: A file is missing, damaged or of another decoder, or a weight is NaN or Inf; the message names
            it and the keys.
        ValueError: This machine does not have the device.
    """
    place = usable_device(device)
    weights, file = check_turbo(Path(folder))
    found = {key: tensor.to(place, dtype) for key, tensor in weights.items()}
    try:
        for key, tensor in found.items():
            require_finite(key, tensor)
    except NonFiniteError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return TurboDecoder.from_tensors(found)


def check_turbo(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Make the checks of :func:`load_turbo` that need no weights: settings, keys and shapes.

    Returns:
        (The decoder's tensors, mapped from the file rather than read; the file).

    Raises:
        CheckpointError: As there.
    """
    settings_file, file = _only(folder, SETTINGS_FILE), _only(folder, WEIGHTS_FILE)
    settings = {**DEFAULTS, **read_json(settings_file)}
    require_settings(settings_file, settings, SETTINGS, WHAT)
    content = _unpickled(file)
    inside = content.get(EMA, content)
    if not isinstance(inside, Mapping):
        raise CheckpointError(f"{file}: {EMA} must be tensors by key, got {type(inside).__name__}")
    weights = {key: t for key, t in inside.items() if str(key).removeprefix("module.").startswith("decoder.")}
    try:
        shapes = {key: t.to("meta") if isinstance(t, torch.Tensor) else t for key, t in weights.items()}
        decoder = TurboDecoder.from_tensors(shapes).decoder
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    blocks: Any = decoder.up_blocks
    there = {
        "decoder_block_out_channels": [block.resnets[0].conv1.conv.out_channels for block in blocks][::-1],
        "decoder_layers_per_block": [len(part.resnets) for part in (decoder.mid_block, *blocks)][::-1],
    }
    require_settings(settings_file, settings, there, f"the weights {file.name}")
    return weights, file


def _only(folder: Path, name: str) -> Path:
    suffix = Path(name).suffix
    there = [folder / name] if (folder / name).exists() else sorted(folder.glob(f"*{suffix}"))
    if len(there) == 1:
        return there[0]
    found = f"{len(there)}: {listed(path.name for path in there)}" if there else "none"
    raise CheckpointError(f"{folder}: must hold {name}, or one {suffix} file under another name; it holds {found}")


def _unpickled(file: Path) -> Mapping[Any, Any]:
    require_regular_file(file)
    try:
        with file.open("rb") as stream:
            if stream.read(8) == b"version ":
                raise CheckpointError(f"{file}: a Git LFS pointer, not the file; run `git lfs pull`")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a pickle that is damaged raises
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{file}: truncated, or not a file of torch.save with tensors alone: {first}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: must hold tensors by key, got {type(content).__name__}")
    return content
