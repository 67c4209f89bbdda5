"""Linear codecs: pixels and samples to latents of the published shapes and back, fitted by PCA.

Video: 48 channels at stride (4, 16, 16) in T = (frames - 1) // 4 + 1 latent frames; the first latent frame is the first
picture alone, repeated to fill its group of 4. Audio: 64 channels per video frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from happyhorse_fast import ambient
from happyhorse_fast.tokens import VAE_STRIDE

FPS = 24
FRAMES = 49
SIDE = 128
"""Rows and columns of pixels."""
SAMPLE_RATE = 12000
FRAME_SAMPLES = SAMPLE_RATE // FPS


@dataclass(frozen=True)
class LinearCodec:
    """latent = (x - mean) @ encoder, x = latent @ decoder + mean, on rows of x.

    Attributes:
        mean: [features].
        encoder: [features, channels].
        decoder: [channels, features].
    """

    mean: torch.Tensor
    encoder: torch.Tensor
    decoder: torch.Tensor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[..., features] -> [..., channels]."""
        return (x - self.mean) @ self.encoder

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[..., channels] -> [..., features]."""
        return latent @ self.decoder + self.mean

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], prefix: str) -> LinearCodec:
        """The codec that was stored under ``prefix``, in float32."""
        return cls(*(tensors[f"{prefix}.{name}"].float() for name in ("mean", "encoder", "decoder")))


def video_blocks(frames: torch.Tensor) -> torch.Tensor:
    """[B, F, H, W, 3] with F = 4n + 1 -> [B, T, H/16, W/16, 4*16*16*3]."""
    st, sh, sw = VAE_STRIDE
    b, f, h, w, c = frames.shape
    if (f - 1) % st or h % sh or w % sw:
        raise ValueError(f"frames must be 4n + 1 of sides that 16 divides, got {list(frames.shape)}")
    filled = torch.cat([frames[:, :1].expand(-1, st - 1, -1, -1, -1), frames], dim=1)
    x = filled.reshape(b, (f - 1) // st + 1, st, h // sh, sh, w // sw, sw, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


@ambient.independent
def encode_video(codec: LinearCodec, frames: torch.Tensor) -> torch.Tensor:
    """[B, F, H, W, 3] in 0..1 -> [B, 48, T, H/16, W/16]."""
    return codec.encode(video_blocks(frames)).permute(0, 4, 1, 2, 3)


@ambient.independent
def decode_video(codec: LinearCodec, latent: torch.Tensor) -> torch.Tensor:
    """[B, 48, T, H/16, W/16] -> [B, 4 (T - 1) + 1, H, W, 3], clamped to 0..1; the first picture is its group's mean."""
    st, sh, sw = VAE_STRIDE
    x = codec.decode(latent.permute(0, 2, 3, 4, 1))
    b, t, h, w, _ = x.shape
    x = x.reshape(b, t, h, w, st, sh, sw, 3).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t, st, h * sh, w * sw, 3)
    first = x[:, :1].mean(dim=2)
    return torch.cat([first, x[:, 1:].flatten(1, 2)], dim=1).clamp(0.0, 1.0)


@ambient.independent
def decode_audio(codec: LinearCodec, latent: torch.Tensor) -> torch.Tensor:
    """[B, frames, 64] -> [B, frames * FRAME_SAMPLES], clamped to -1..1."""
    return codec.decode(latent).flatten(1).clamp(-1.0, 1.0)
