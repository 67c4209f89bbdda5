"""What training minimises: the error of the velocity at noise levels of the sampler, on noised clips and on its own."""

from __future__ import annotations

import torch
from batched import Batch, BatchedHappyHorse

from happyhorse_fast.sampler.distilled import noise_levels

STEPS, SHIFT = 8, 5.0
IMAGE_SHARE = 0.15
"""Share of the clips whose first latent frame is given, as image to video has it."""


def draw_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count] noise levels: half are those of the 8 steps, half lie anywhere under the same shift."""
    visited = torch.tensor(noise_levels(STEPS, SHIFT))[torch.randint(0, STEPS, (count,), generator=generator)]
    even = torch.rand(count, generator=generator).clamp(0.01, 0.999)
    between = SHIFT * even / (1 + (SHIFT - 1) * even)
    return torch.where(torch.arange(count) % 2 == 0, visited, between)


class Noised:
    """A batch of clips with noise in it, and the clean clips to find.

    Args:
        clips: Clean.
        sigma: [B] noise levels.
        generator: Of noise, and of the choice of clips whose first latent frame stays clean.
    """

    def __init__(self, clips: Batch, sigma: torch.Tensor, generator: torch.Generator) -> None:
        self.clips, self.generator = clips, generator
        self.given = torch.rand(len(sigma), generator=generator) < IMAGE_SHARE
        self.renoise(clips[0], clips[1], sigma)

    def renoise(self, video: torch.Tensor, audio: torch.Tensor, sigma: torch.Tensor) -> None:
        """Fresh noise of level ``sigma`` [B] on ``video`` and ``audio``, which may be what a model takes for clean."""
        self.sigma, self.video_sigma, self.audio_sigma = sigma, sigma[:, None, None, None, None], sigma[:, None, None]
        self.video = torch.lerp(video, torch.randn(video.shape, generator=self.generator), self.video_sigma)
        self.audio = torch.lerp(audio, torch.randn(audio.shape, generator=self.generator), self.audio_sigma)
        self.video[self.given, :, 0] = self.clips[0][self.given, :, 0]

    def errors(self, model: BatchedHappyHorse) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] mean square error of the velocity (x - clean) / sigma, of video and audio; given frames do not count."""
        clean_video, clean_audio, text = self.clips
        video_v, audio_v = model(self.video, self.audio, text)
        video_error = (video_v - (self.video - clean_video) / self.video_sigma).square().mean(dim=(1, 3, 4))  # [B, T]
        audio_error = (audio_v - (self.audio - clean_audio) / self.audio_sigma).square().mean(dim=(1, 2))
        scored = torch.ones_like(video_error)
        scored[self.given, 0] = 0
        return (video_error * scored).sum(dim=1) / scored.sum(dim=1), audio_error

    @torch.no_grad()
    def advance(self, model: BatchedHappyHorse, following: torch.Tensor) -> None:
        """One step of the sampler to the levels ``following`` [B]."""
        video_v, audio_v = model(self.video, self.audio, self.clips[2])
        self.renoise(self.video - self.video_sigma * video_v, self.audio - self.audio_sigma * audio_v, following)


def flow_errors(
    model: BatchedHappyHorse, clips: Batch, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow matching: velocity errors [B] of video and audio on clips with noise in them."""
    return Noised(clips, draw_levels(len(clips[0]), generator), generator).errors(model)


def rollout_errors(
    model: BatchedHappyHorse, clips: Batch, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors [B] of the clean clip after 1 to 3 steps of the model's own sampler.

    In few steps the sampler shows the model its own blurred guesses with noise on them, which no noised clip looks
    like: a small ball that could be in three places is then found in none. Here the model starts from a noised clip,
    steps as the sampler does, and must still name that clip. Errors are those of the clean clip (the velocity's times
    sigma), since what the guess has lost cannot be found again and would count for more the lower the noise.
    """
    count = len(clips[0])
    levels = torch.tensor(noise_levels(STEPS, SHIFT))
    steps = int(torch.randint(1, 4, (1,), generator=generator))
    at = torch.randint(0, STEPS - steps, (count,), generator=generator)
    state = Noised(clips, levels[at], generator)
    for step in range(1, steps + 1):
        state.advance(model, levels[at + step])
    video_error, audio_error = state.errors(model)
    return video_error * state.sigma.square(), audio_error * state.sigma.square()
