"""``sample``: a clip's video and audio from noise and a prompt."""

from __future__ import annotations

from typing import Any

import torch

from happyhorse_fast.arguments import NonFiniteError, require_whole
from happyhorse_fast.eager.sequence import check_inputs
from happyhorse_fast.fast.parallelize import ranks_of
from happyhorse_fast.sampler.distilled import DISTILLED_STEPS, distilled
from happyhorse_fast.sampler.noise import Noise, noise_source
from happyhorse_fast.sampler.progress import Callback
from happyhorse_fast.sampler.steps import Denoiser, latent_dtype, require_denoiser, require_positive, run_steps
from happyhorse_fast.sampler.unipc import GUIDED_STEPS, guided


@torch.no_grad()
def sample(
    model: Denoiser,
    video: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor,
    *,
    steps: int | None = None,
    shift: float = 5.0,
    image: torch.Tensor | None = None,
    hold_audio: bool = False,
    noise: Noise = None,
    callback: Callback | None = None,
    progress: bool = True,
    guidance: float | None = None,
    null_text: torch.Tensor | None = None,
    guidance_audio: float = 5.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoise a clip: the distilled model's 8 steps, or with ``guidance`` the base model's 32 UniPC steps.

    Source of the formulas: the public implementation, ``inference/pipeline/video_generate.py`` at commit 209209b.

    Args:
        model: A denoiser with attributes ``config``, ``device`` and ``stream_dtype``: (video, audio, text) ->
            velocities.
        video: [1, C, T, H, W] standard normal noise to start from, H and W even.
        audio: [1, A, Ca] standard normal noise to start from; with ``hold_audio`` a latent.
        text: [1, L, Ct] embedding of the prompt.
        steps: Number of steps, at least 1; by default 8, or 32 with ``guidance``.
        shift: Of the noise levels, more than 0; 5 as published.
        image: Image to video: [1, C, 1, H, W] latent of the image, which replaces the first latent frame before each
            step and at the end.
        hold_audio: Video from sound: ``audio`` is the latent of a given sound in place of noise. Every step starts from
            it as it is, and it is returned. Noise is drawn as without, so the video's is the same.
        noise: Noise that the distilled sampler adds at step i (from 0), at every step but the last: a
            ``torch.Generator`` on the latents' device or the CPU; a callable (name, shape) -> float32 tensor, asked for
            ``noise.video.{i}`` and ``noise.audio.{i}``; None for torch's global generator. Guided steps add none.
        callback: Called with a :class:`StepInfo` after every step; what it raises ends the run.
        progress: Whether to show a progress bar on stderr.
        guidance: Classifier-free guidance scale of the video, more than 0; 5 as published. From timestep 500 down it
            is 2. None: the distilled sampler.
        null_text: [1, L0, Ct] embedding of the negative prompt; with ``guidance``, and only with it.
        guidance_audio: Guidance scale of the audio at every step, more than 0; used with ``guidance`` only.

    Returns:
        (video [1, C, T, H, W], audio [1, A, Ca]), float32; float64 from a float64 model. The inputs are left as they
        are.

    Raises:
        TypeError, ValueError: An argument is of a wrong type, shape, device or range; before the first step, except for
            what a callable ``noise`` returns.
        NonFiniteError: NaN or Inf in an input, in noise, or in a velocity: then with step and modality.
        ImportError: ``guidance`` without diffusers (extra ``base``).
    """
    require_denoiser("model", model)
    check_inputs(model.config, video, audio, text, model.device)
    default = DISTILLED_STEPS if guidance is None else GUIDED_STEPS
    steps = default if steps is None else require_whole("steps", steps, 1)
    shift = require_positive("shift", shift)
    guidance_audio = require_positive("guidance_audio", guidance_audio)
    if not isinstance(hold_audio, bool):
        raise TypeError(f"hold_audio must be True or False, got {hold_audio!r} of type {type(hold_audio).__name__}")
    dtype = latent_dtype(model)
    ranks = ranks_of(model)
    draw = noise_source(noise, model.device, dtype, ranks)
    if guidance is None:
        if null_text is not None:
            raise ValueError("null_text must come with guidance, such as guidance=5.0; got guidance=None")
        title = "distilled sampling"
        advance, sigmas = distilled(model, text, steps, shift, draw)
    else:
        title = "guided sampling"
        if null_text is None:
            raise ValueError("guidance must come with null_text [1, L0, Ct], the negative prompt; got null_text=None")
        try:
            check_inputs(model.config, video, audio, null_text, model.device)
        except (TypeError, ValueError, NonFiniteError) as error:
            raise type(error)(f"null_text, in the place of text: {error}") from None
        guidance = require_positive("guidance", guidance)
        advance, sigmas = guided(model, text, null_text, steps, shift, guidance, guidance_audio)
    video, audio = video.to(dtype), audio.to(dtype)
    how: dict[str, Any] = {"title": title, "image": image, "callback": callback, "progress": progress}
    return run_steps(advance, sigmas, video, audio, hold_audio=hold_audio, ranks=ranks, **how)
