"""Accelerated models of two layers for the tests, on clips of a few blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from happyhorse_fast import golden
from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.sequence import Clip
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig

CONFIG = golden.load_case("postnorm_v2_fp32").config.replace(
    num_layers=2, mm_layers=(0,), gelu7_layers=(0,), post_norm_layers=(), local_attn_layers=()
)


class PublicLayout(torch.nn.Module):
    """The public implementation's attributes around our eager layers, without its forward pass."""

    def __init__(self, model: HappyHorse) -> None:
        super().__init__()
        for name in ("adapter", "block", "final_norm_video", "final_norm_audio"):
            setattr(self, name, getattr(model, name))
        self.final_linear_video, self.final_linear_audio = model.final_linear_video, model.final_linear_audio
        self.config = SimpleNamespace(hidden_size=model.config.hidden_size)
        for i, layer in enumerate(self.block.layers):
            layer.attention.config = SimpleNamespace(use_local_attn=i in model.config.local_attn_layers)


def eager_model(layers: int = 2) -> HappyHorse:
    config = CONFIG.replace(num_layers=layers)
    model = HappyHorse(config)
    model.load_state_dict(golden.recipe_weights(config, 3))
    return model


def fast_model(public: bool = False, layers: int = 2, **options: Any) -> Any:
    model: torch.nn.Module = eager_model(layers)
    return accelerate(PublicLayout(model) if public else model, FastConfig(backend="reference", **options))


def clip(frames: int = 2, columns: int = 4, audio: int = 5, text: int = 6) -> tuple[torch.Tensor, ...]:
    """video, audio and text of 2 x ``columns`` tokens a frame."""
    shapes = (
        ("v", (1, 48, frames, 4, 2 * columns)),
        ("a", (1, audio, CONFIG.audio_in_channels)),
        ("t", (1, text, CONFIG.text_in_channels)),
    )
    return tuple(golden.draw(3, name, shape) for name, shape in shapes)


def several_blocks() -> tuple[torch.Tensor, ...]:
    """Four frames of 128 tokens: maps can leave something out."""
    return clip(4, 64, 13)


def packed(inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """The same clip as the public signature takes it."""
    video, audio, text = inputs
    grid = Clip(video.shape[2], video.shape[3] // 2, video.shape[4] // 2, audio.shape[1], text.shape[1])
    coords, modality = sequence.coordinates(grid, CONFIG.coords_style), sequence.modality_of_tokens(grid)
    return sequence.pack_tokens(video, audio, text), coords, modality, None, None


def same(result: Any, expected: Any) -> bool:
    if isinstance(result, torch.Tensor):
        return torch.equal(result, expected)
    return all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
