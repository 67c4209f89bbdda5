"""What the samplers' tests share: a cheap denoiser, a clip for it, and noise by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from happyhorse_fast import golden
from happyhorse_fast.config import ModelConfig

CONFIG = ModelConfig.preset("tiny").replace(
    num_layers=2, hidden_size=32, head_dim=16, num_heads_q=2, mm_layers=(0,), gelu7_layers=(), local_attn_layers=(1,),
    video_in_channels=12, audio_in_channels=5, text_in_channels=7,
)  # fmt: skip
Latents = tuple[torch.Tensor, torch.Tensor]
Velocity = Callable[[int, torch.Tensor, torch.Tensor], Latents]


class Toy:
    """A denoiser whose velocities depend on every input, and which keeps what it was called with."""

    device = torch.device("cpu")

    def __init__(self, config: ModelConfig = CONFIG, change: Velocity = lambda call, video, audio: (video, audio)):
        self.config, self.stream_dtype, self.change = config, torch.float32, change
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> Latents:
        self.calls.append((video.clone(), audio.clone(), text.clone()))
        hint = text.to(video.dtype)
        return self.change(
            len(self.calls),
            torch.tanh(video) * (1 + hint.mean()) + audio.mean(),
            torch.sin(audio) + hint.std() * video.mean(),
        )


def clip(seed: int = 0, t: int = 2, h: int = 4, w: int = 6, a: int = 4, length: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 3, t, h, w), (1, a, 5), (1, length, 7))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def replay(name: str, shape: torch.Size) -> torch.Tensor:
    return golden.draw(7, name, shape)


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())
