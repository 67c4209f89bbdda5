"""``super_resolve``: the second stage, from a small video latent to a large one."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_number, require_whole
from happyhorse_fast.config import PATCH
from happyhorse_fast.eager.sequence import check_inputs
from happyhorse_fast.fast.parallelize import ranks_of
from happyhorse_fast.sampler.noise import Noise, noise_source
from happyhorse_fast.sampler.progress import Callback
from happyhorse_fast.sampler.steps import (
    Denoiser,
    latent_dtype,
    predict,
    require_denoiser,
    require_positive,
    run_steps,
)
from happyhorse_fast.sampler.unipc import move_history, unipc_scheduler, unipc_step

SIGNAL_LEVELS = 1000
"""Entries of the signal table."""
HOST = torch.device("cpu")


@ambient.makes_tensors
def signal_table() -> torch.Tensor:
    """How much of the signal is kept per noise index; index 0 is the cleanest, 999 is pure noise.

    A zero-terminal-SNR table: beta = linspace(sqrt(0.00085), sqrt(0.012), 1000)^2, the square root of the cumulative
    product of 1 - beta, moved so that the last is 0 and scaled so that the first stays what it was.

    Returns:
        [1000] float32 on the CPU.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, SIGNAL_LEVELS, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0).float().sqrt()
    return (kept - kept[-1]) * (kept[0] / (kept[0] - kept[-1]))


@torch.no_grad()
def super_resolve(
    sr_model: Denoiser,
    video: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor,
    size: tuple[int, int],
    *,
    steps: int = 5,
    shift: float = 5.0,
    noise: Noise = None,
    noise_index: int = 220,
    audio_noise: float = 0.7,
    image: torch.Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    history_on_host: bool = False,
) -> torch.Tensor:
    """Upsample a clip's video latent, noise it in part, and denoise it at the larger size with unguided UniPC steps.

    Start: s * z + sqrt(1 - s^2) * noise, z the trilinear upsampling (corners aligned), s = signal_table()[noise_index].
    The audio guides the video; it is noised once, audio_noise * noise + (1 - audio_noise) * audio, and stays so. The
    clip's audio remains that of the first stage. Source: as :func:`happyhorse_fast.sampler.sample`.

    Args:
        sr_model: A super-resolution denoiser; attributes as for :func:`happyhorse_fast.sampler.sample`.
        video: [1, C, T, h, w] latent of the first stage, h and w even.
        audio: [1, A, Ca] latent of the first stage.
        text: [1, L, Ct] embedding of the prompt.
        size: (H, W) of the *latent* to make, in latent rows and columns, not pixels: 1920x1088 pixels are (68, 120).
            Both even, and at least (h, w).
        steps: Number of steps, at least 1.
        shift: Of the noise levels, more than 0.
        noise: As for :func:`happyhorse_fast.sampler.sample`; a callable is asked for ``noise.sr.video`` and
            ``noise.sr.audio``.
        noise_index: 0..999, where in the signal table to start; at 0 nothing is added to the video.
        audio_noise: 0..1, the noise's part in the audio; at 0 none is drawn.
        image: [1, C, 1, H, W] latent of the image at the *large* size, which replaces the first latent frame before
            each step and at the end.
        callback: Called with a :class:`StepInfo` after every step; what it raises ends the run.
        progress: Whether to show a progress bar on stderr.
        history_on_host: Keep the solver's history in host memory while the model runs: three latents less on the
            device, 0.4 GiB of 15 s at 1080p, for as many copies a step. The result is the same.

    Returns:
        [1, C, T, H, W] video latent, float32; float64 from a float64 model. The inputs are left as they are.

    Raises:
        TypeError, ValueError: An argument is of a wrong type, shape, device or range; before the first step.
        NonFiniteError: NaN or Inf in an input, in noise, or in a velocity: then with step and modality.
        ImportError: diffusers is not installed (extra ``base``).
    """
    require_denoiser("sr_model", sr_model)
    check_inputs(sr_model.config, video, audio, text, sr_model.device)
    height, width = _check_size(size, video.shape)
    steps = require_whole("steps", steps, 1)
    shift = require_positive("shift", shift)
    noise_index = require_whole("noise_index", noise_index, 0, SIGNAL_LEVELS - 1)
    audio_noise = require_number("audio_noise", audio_noise, "from 0 to 1", lambda part: 0 <= part <= 1)
    dtype = latent_dtype(sr_model)
    ranks = ranks_of(sr_model)
    draw = noise_source(noise, sr_model.device, dtype, ranks)
    target = torch.Size((*video.shape[:3], height, width))
    solver = unipc_scheduler(steps, shift)

    def noised_video() -> torch.Tensor:
        with ambient.held():
            large = interpolate(video.to(dtype), target[2:], mode="trilinear", align_corners=True)
        if not noise_index:
            return large
        signal = float(signal_table()[noise_index])
        return signal * large + (1 - signal**2) ** 0.5 * draw("noise.sr.video", large.shape)

    def noised_audio() -> torch.Tensor:
        clean = audio.to(dtype)
        if not audio_noise:
            return clean
        return audio_noise * draw("noise.sr.audio", clean.shape) + (1 - audio_noise) * clean

    def advance(i: int, video: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        velocity, _ = predict(sr_model, video, audio, text, f"step {i + 1} of {steps}")
        if history_on_host:
            move_history(solver, video.device)
        lower = unipc_step(solver, velocity, i, video)
        if history_on_host:
            move_history(solver, HOST)
        return lower, audio

    sigmas = solver.sigmas[:-1].tolist()
    made, _ = run_steps(
        advance,
        sigmas,
        # Here and with no ** beside: a name, or Python 3.11's tuple of arguments, would keep the first latent alive.
        noised_video(),
        noised_audio(),
        title="super-resolution",
        image=image,
        callback=callback,
        progress=progress,
        ranks=ranks,
    )
    return made


def _check_size(size: object, video: torch.Size) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size must be (H, W), latent rows and columns, got {size!r}")
    found = []
    for axis, patch, value, least in zip("HW", PATCH[1:], size, video[3:], strict=True):
        found.append(require_whole(f"{axis} of size, in latent positions,", value, least))
        if found[-1] % patch:
            raise ValueError(f"{axis} of size must be a multiple of {patch} (patches are 1x2x2), got {tuple(size)}")
    return found[0], found[1]
