"""The loop that every sampler runs: velocities from the model, image conditioning, progress, callback."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from happyhorse_fast.arguments import require_finite, require_number, require_tensor
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.fast.step import at_step
from happyhorse_fast.parallel.group import Ranks
from happyhorse_fast.sampler.progress import StepInfo, peak_memory, step_display

SIGMA_MAX = float(np.float32(0.999))
"""Noise level that a run starts from, before the shift. The published schedulers keep it in float32 and go on from
there in float64; from 0.999 itself, levels differ in the last bit (the seventh of 8)."""
Advance = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(step from 0, video, audio) -> (video, audio) one noise level lower, as new tensors."""


class Denoiser(Protocol):
    """A model as the samplers call it: the eager one, an accelerated one, or a wrapper of either."""

    @property
    def config(self) -> ModelConfig:
        """Sizes that the inputs are held against."""

    @property
    def device(self) -> torch.device:
        """Where the inputs have to be."""

    @property
    def stream_dtype(self) -> torch.dtype:
        """Dtype of the velocities."""

    # Any: calling a torch.nn.Module is untyped. The tensors it returns must outlive the next call.
    def __call__(self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> Any:
        """[1, C, T, H, W], [1, A, Ca], [1, L, Ct] -> video and audio velocities in the first two shapes."""


def require_denoiser(name: str, model: object) -> None:
    """Raise a TypeError where ``model`` lacks what :class:`Denoiser` asks for."""
    missing = [a for a in ("config", "device", "stream_dtype") if not hasattr(model, a)]
    if missing or not callable(model):
        raise TypeError(
            f"{name} must be callable and have the attributes config, device and stream_dtype; "
            f"got {type(model).__name__}, without {', '.join(missing) or 'a call'}"
        )


def latent_dtype(model: Denoiser) -> torch.dtype:
    """Float32, in which latents are kept between steps; float64 for a float64 model."""
    return torch.promote_types(model.stream_dtype, torch.float32)


def unshifted_levels(steps: int) -> NDArray[np.float64]:
    """Levels that ``steps`` steps start from, without the shift: evenly spaced from 0.999 down, 0 left out; [steps]."""
    return np.linspace(SIGMA_MAX, 0.0, steps + 1)[:-1]


def require_positive(name: str, value: object) -> float:
    """A finite number above 0; errors as :func:`require_number`."""
    return require_number(name, value, "finite and more than 0", lambda number: 0 < number < math.inf)


def predict(
    model: Denoiser, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Video and audio velocities in the latents' shapes and dtype.

    Args:
        model: The denoiser.
        video: [1, C, T, H, W].
        audio: [1, A, Ca].
        text: [1, L, Ct].
        where: Such as ``"step 3 of 8"``, for messages.

    Raises:
        TypeError, ValueError: The model returned no floating-point tensor of the latent's shape and device.
        NonFiniteError: NaN or Inf in a velocity; names the modality and ``where``.
    """
    velocities = []
    for modality, value, latent in zip(("video", "audio"), model(video, audio, text), (video, audio), strict=True):
        name = f"{modality} velocity at {where}"
        velocity = require_tensor(name, value, latent.shape, device=latent.device)
        require_finite(name, velocity)
        velocities.append(velocity.to(latent.dtype))
    return velocities[0], velocities[1]


def run_steps(
    advance: Advance,
    sigmas: Sequence[float],
    video: torch.Tensor,
    audio: torch.Tensor,
    *,
    title: str,
    image: object,
    callback: object,
    progress: bool,
    hold_audio: bool = False,
    ranks: Ranks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step per noise level.

    Args:
        advance: The step; what it calls knows its place in the run (:func:`at_step`).
        sigmas: Noise levels that the steps start from; their number is the number of steps.
        video: [1, C, T, H, W] to start from; left as it is.
        audio: [1, A, Ca] to start from; left as it is.
        title: Of the progress bar.
        image: [1, C, 1, H, W] that replaces the first latent frame before each step and at the end, or None.
        callback: Called after every step.
        progress: Whether to show a progress bar.
        hold_audio: Start every step from the given audio, and return it.
        ranks: That take the steps together: what this one raises ends the others.

    Returns:
        (video, audio) after the last step.

    Raises:
        TypeError, ValueError, NonFiniteError: ``image`` is no finite floating-point tensor of its shape on the latent's
            device, or ``callback`` can be neither called nor left out.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable with a StepInfo, or None; got {type(callback).__name__}")
    first: torch.Tensor | None = None
    if image is not None:
        first = require_tensor("image", image, (1, video.shape[1], 1, *video.shape[3:]), device=video.device)
        require_finite("image", first)
        first = first.to(video.dtype)
    steps, given = len(sigmas), audio
    video = _with_image(video, first)
    told = nullcontext() if ranks is None else ranks.meeting.between_calls()
    with told, step_display(title, steps, progress) as show:
        for i, sigma in enumerate(sigmas):
            start = time.perf_counter()
            with at_step(i, steps):
                video, audio = advance(i, video, audio)
            audio = given if hold_audio else audio
            video = _with_image(video, first)
            if video.is_cuda:
                torch.cuda.synchronize(video.device)  # or the time would be that of the launches
            seconds = time.perf_counter() - start
            info = StepInfo(i + 1, steps, sigma, seconds, peak_memory(video.device), video, audio)
            show(info)
            if callback is not None:
                callback(info)
    return video, audio


def _with_image(video: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    # A copy: a solver or a callback may still hold the tensor that was passed.
    return video if image is None else torch.cat([image, video[:, :, 1:]], dim=2)
