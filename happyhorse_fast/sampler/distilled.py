"""The distilled sampler: predict the clean latent, then noise it again to the next, lower level."""

from __future__ import annotations

import torch

from happyhorse_fast.sampler.levels import noise_levels
from happyhorse_fast.sampler.noise import Draw
from happyhorse_fast.sampler.steps import Advance, Denoiser, predict

DISTILLED_STEPS = 8
"""Steps that the model was distilled to."""


def distilled(model: Denoiser, text: torch.Tensor, steps: int, shift: float, draw: Draw) -> tuple[Advance, list[float]]:
    """A step, and the noise levels that steps start from: x0 = x - s * v, then x = s' * noise + (1 - s') * x0.

    The noise is fresh, for video and audio alike: ``draw`` is called with ``noise.video.{i}`` and ``noise.audio.{i}``,
    i from 0, at every step but the last, where s' is 0.
    """
    sigmas = noise_levels(steps, shift)

    def advance(i: int, video: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma, following = sigmas[i], sigmas[i + 1]
        velocities = predict(model, video, audio, text, f"step {i + 1} of {steps}")
        clean_video, clean_audio = (x - sigma * v for x, v in zip((video, audio), velocities, strict=True))
        if following == 0:
            return clean_video, clean_audio
        return (
            following * draw(f"noise.video.{i}", video.shape) + (1 - following) * clean_video,
            following * draw(f"noise.audio.{i}", audio.shape) + (1 - following) * clean_audio,
        )

    return advance, sigmas[:-1]
