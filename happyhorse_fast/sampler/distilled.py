"""The distilled sampler: predict the clean latent, then noise it again to the next, lower level."""

from __future__ import annotations

import numpy as np
import torch

from happyhorse_fast.sampler.noise import Draw
from happyhorse_fast.sampler.steps import Advance, Denoiser, predict, unshifted_levels

DISTILLED_STEPS = 8
"""Steps that the model was distilled to."""


def noise_levels(steps: int, shift: float) -> list[float]:
    """Noise levels of a distilled run: s -> shift * s / (1 + (shift - 1) * s) of the even levels, and 0 at the end.

    Args:
        steps: Number of steps, at least 1.
        shift: More than 0; above 1 spends more steps at high noise.

    Returns:
        steps + 1 falling values, rounded to float32, as the published schedulers keep them.
    """
    even = unshifted_levels(steps)
    shifted = shift * even / (1 + (shift - 1) * even)
    return [float(s) for s in np.append(shifted, 0.0).astype(np.float32)]


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
