"""The pony's configuration, and its weights and codecs as they ship."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from happyhorse_fast import ambient
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.compiled import untraced
from happyhorse_fast.pony.codec import LinearCodec
from happyhorse_fast.pony.prompt import TEXT_CHANNELS

FOLDER = Path(__file__).parent
CODEC_FILE = FOLDER / "codecs.safetensors"
WEIGHTS_FILE = FOLDER / "model.safetensors"

PONY = ModelConfig(
    num_layers=6,
    hidden_size=256,
    head_dim=64,
    num_heads_q=4,
    num_heads_kv=2,
    text_in_channels=TEXT_CHANNELS,
    mm_layers=(0, 5),
    gelu7_layers=(0,),
    local_attn_layers=(1, 3),
    frame_receptive_field=2,
)
"""7.4 M parameters; two of the four shared layers see a window of 5 latent frames."""


class Codecs(NamedTuple):
    """Linear codecs between pixels or samples and latents."""

    video: LinearCodec
    audio: LinearCodec


@lru_cache(maxsize=1)
@ambient.makes_tensors
def load_codecs() -> Codecs:
    """The codecs that the pony was trained with."""
    with untraced():  # kept for every later call
        tensors = load_file(CODEC_FILE)
        return Codecs(LinearCodec.from_tensors(tensors, "video"), LinearCodec.from_tensors(tensors, "audio"))


def weights_digest() -> str:
    """SHA-256 of the weights: what a measured number holds for."""
    return hashlib.sha256(WEIGHTS_FILE.read_bytes()).hexdigest()


@ambient.makes_tensors
def load_model(compute_dtype: torch.dtype = torch.bfloat16) -> HappyHorse:
    """The trained model on the CPU.

    Args:
        compute_dtype: As :class:`happyhorse_fast.eager.model.HappyHorse` takes it.
    """
    model = HappyHorse(PONY, compute_dtype)
    weights = load_file(WEIGHTS_FILE)
    bands = {"adapter.rope.bands": model.adapter.rope.bands}
    model.load_state_dict({name: value.to(model.state_dict()[name].dtype) for name, value in weights.items()} | bands)
    return model.eval()
