"""UniPC on a rectified flow: diffusers' scheduler, set up as the published checkpoints were sampled; guided steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from happyhorse_fast import ambient, optional
from happyhorse_fast.sampler.steps import Advance, Denoiser, predict, unshifted_levels

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler

GUIDED_STEPS = 32
"""Steps that the published base model is sampled with."""
LATE_VIDEO_GUIDANCE = 2.0
"""Guidance of the video from timestep 500 down, where the public code lowers it; audio keeps its own throughout."""


@ambient.makes_tensors
def unipc_scheduler(steps: int, shift: float) -> UniPCMultistepScheduler:
    """A scheduler for one latent over one run; it keeps that latent's history.

    Its steps are the published code's bit for bit. Without the explicit levels diffusers would choose other ones, with
    results 0.2 to 0.4 % off.

    Args:
        steps: Number of steps.
        shift: Of the noise levels.

    Returns:
        Scheduler with ``sigmas`` [steps + 1] and ``timesteps`` [steps], both on the CPU, wherever the latents are.

    Raises:
        ImportError: diffusers is not installed or does not import; says what to install.
    """
    optional.require("diffusers", "a UniPC step (guidance, super_resolve)")
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=unshifted_levels(steps))
    # By index: beyond about 200 steps the first timesteps, which are whole numbers, repeat and name no single step.
    scheduler.set_begin_index(0)
    return scheduler


@ambient.independent
def unipc_step(
    scheduler: UniPCMultistepScheduler, velocity: torch.Tensor, index: int, latent: torch.Tensor
) -> torch.Tensor:
    """A latent one noise level lower; its products are in the latent's dtype, whatever torch's settings are."""
    (lower,) = scheduler.step(velocity, scheduler.timesteps[index], latent, return_dict=False)
    return lower


def move_history(scheduler: UniPCMultistepScheduler, device: torch.device) -> None:
    """Put the latents that a scheduler keeps between steps, three of them, on a device."""
    kept = scheduler.model_outputs
    scheduler.model_outputs = [None if output is None else output.to(device) for output in kept]
    if scheduler.last_sample is not None:
        scheduler.last_sample = scheduler.last_sample.to(device)


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
