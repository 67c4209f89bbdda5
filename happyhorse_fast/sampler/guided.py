"""The base model's sampler: classifier-free guidance and UniPC steps."""

from __future__ import annotations

import torch

from happyhorse_fast.sampler.steps import Advance, Denoiser, predict
from happyhorse_fast.sampler.unipc import unipc_scheduler, unipc_step

GUIDED_STEPS = 32
"""Steps that the published base model is sampled with."""
LATE_VIDEO_GUIDANCE = 2.0
"""Guidance of the video from timestep 500 down, where the public code lowers it; audio keeps its own throughout."""


def video_guidance(guidance: float, timestep: int) -> float:
    """Guidance of the video at a timestep of 0..999: ``guidance`` above 500, 2 from 500 down."""
    return guidance if timestep > 500 else LATE_VIDEO_GUIDANCE


def guided(
    model: Denoiser,
    text: torch.Tensor,
    null_text: torch.Tensor,
    steps: int,
    shift: float,
    guidance: float,
    guidance_audio: float,
) -> tuple[Advance, list[float]]:
    """A step, and the noise levels that steps start from: v = v_null + scale * (v_text - v_null), then UniPC.

    Video and audio have a solver each.
    """
    video_solver, audio_solver = unipc_scheduler(steps, shift), unipc_scheduler(steps, shift)

    def advance(i: int, video: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        where, t = f"step {i + 1} of {steps}", video_solver.timesteps[i]
        text_video, text_audio = predict(model, video, audio, text, where)
        null_video, null_audio = predict(model, video, audio, null_text, f"{where} (null_text)")
        video_velocity = null_video + video_guidance(guidance, int(t)) * (text_video - null_video)
        audio_velocity = null_audio + guidance_audio * (text_audio - null_audio)
        return unipc_step(video_solver, video_velocity, i, video), unipc_step(audio_solver, audio_velocity, i, audio)

    return advance, video_solver.sigmas[:-1].tolist()
