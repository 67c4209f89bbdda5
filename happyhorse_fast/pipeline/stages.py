"""The stages of a run, one after another: text, picture, sound, denoising, super-resolution, decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from happyhorse_fast.config import LATENT_CHANNELS, PATCH
from happyhorse_fast.eager.sequence import Clip, check_time_axis
from happyhorse_fast.pipeline.audio_file import AUDIO_CHANNELS
from happyhorse_fast.pipeline.host_frames import host_frames
from happyhorse_fast.pipeline.latents import Latents
from happyhorse_fast.pipeline.parts import Parts
from happyhorse_fast.pipeline.progress import Monitor
from happyhorse_fast.pipeline.request import AUDIO, DENOISED, IMAGE, RESOLVED, SOUND, VIDEO, Request
from happyhorse_fast.sampler import StepInfo, sample, super_resolve

GUIDANCE = 5.0
"""Of the base model, as published."""


def stages_of(request: Request, done: str | None = None) -> list[str]:
    """Names of a run's stages in order, of those after ``done``."""
    names = list(request.parts)
    return names if done is None else names[names.index(done) + 1 :]


class Noise:
    """All noise of a run from one generator, in the order in which the public implementation draws it.

    Audio, then video, then per distilled step video and audio, of the last step too, whose noise has weight 0; then
    video and audio of the second stage. A posterior that a given sound is sampled from stands in the audio's place.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        where = device if request.noise == "device" else torch.device("cpu")
        self.device = device
        self.generator = torch.Generator(where).manual_seed(request.seed)

    def resume(self, latents: Latents) -> None:
        """Go on where the noise of ``latents`` stopped.

        Raises:
            ValueError: It was drawn on another kind of device.
        """
        here = self.generator.device.type
        if latents.noise_device != here:
            raise ValueError(
                f"resume must go on with noise of {latents.noise_device}, on which it began; this run's is of {here} "
                '(noise="cpu" goes on anywhere)'
            )
        self.generator.set_state(latents.noise)

    def draw(self, *shape: int) -> torch.Tensor:
        """Standard normal float32 [*shape] on the run's device."""
        made = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return made.to(self.device)


def check_text(request: Request, parts: Parts, text: torch.Tensor) -> None:
    """Hold an embedding against all models before the first is loaded.

    Raises:
        ValueError: Too few tokens for a model, or another width; names the model.
    """
    for name in request.models:
        config = parts.config(name)
        length, width = text.shape[1:]
        if width != config.text_in_channels:
            raise ValueError(f"the model {name} takes embeddings of width {config.text_in_channels}, text has {width}")
        tokens = request.first_tokens
        try:
            check_time_axis(
                Clip(tokens.T, tokens.H // PATCH[1], tokens.W // PATCH[2], tokens.audio, length), config.coords_style
            )
        except ValueError as error:
            raise ValueError(f"prompt is too short for the model {name}: {error}") from error


def encode_image(parts: Parts, monitor: Monitor, pictures: list[torch.Tensor]) -> list[torch.Tensor]:
    """Latents [1, 48, 1, H / 16, W / 16] of the first picture at several sizes, [1, 3, 1, H, W], on the CPU."""
    with monitor.stage(IMAGE), parts.image_encoder() as codec:
        monitor.loaded()
        made = []
        for step, pixels in enumerate(pictures, start=1):
            made.append(codec.encode(pixels.to(parts.device)).cpu())
            monitor.step(step, len(pictures))
    return made


def encode_sound(request: Request, parts: Parts, monitor: Monitor, sound: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Latent [1, A, 64] of a given sound, a sample of its posterior, on the device."""
    with monitor.stage(SOUND), parts.audio_encoder() as codec:
        monitor.loaded()
        latent = codec.encode(sound, request.seconds, noise.generator)
        monitor.step(1, 1)
    return latent


def denoise(
    request: Request,
    parts: Parts,
    monitor: Monitor,
    noise: Noise,
    text: torch.Tensor,
    null_text: torch.Tensor | None,
    image: torch.Tensor | None,
    sound: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """First stage: (video [1, 48, T, H, W], audio [1, A, 64]) on the device."""
    tokens, place = request.first_tokens, parts.device
    with monitor.stage(DENOISED), parts.model(request.models[0]) as model:
        monitor.loaded()
        audio = noise.draw(1, tokens.audio, AUDIO_CHANNELS) if sound is None else sound.to(place)
        video = noise.draw(1, LATENT_CHANNELS, tokens.T, tokens.H, tokens.W)
        how: dict[str, Any] = {} if null_text is None else {"guidance": GUIDANCE, "null_text": null_text.to(place)}
        video, audio = sample(
            model,
            video,
            audio,
            text.to(place),
            image=_to(image, place),
            hold_audio=sound is not None,
            noise=noise.generator,
            callback=_steps_of(monitor),
            progress=False,
            **how,
        )
        if null_text is None:  # of the last step, which the sampler does not draw
            noise.draw(*video.shape), noise.draw(*audio.shape)
    return video, audio


def resolve(
    request: Request, parts: Parts, monitor: Monitor, noise: Noise, latents: Latents, history_on_host: bool = False
) -> torch.Tensor:
    """Second stage: video [1, 48, T, H, W] at the full size, on the device."""
    tokens, place = request.last_tokens, parts.device
    with monitor.stage(RESOLVED), parts.model(request.models[1]) as model:
        monitor.loaded()
        return super_resolve(
            model,
            latents.video.to(place),
            latents.audio.to(place),
            latents.text.to(place),
            (tokens.H, tokens.W),
            image=_to(latents.image, place),
            noise=noise.generator,
            callback=_steps_of(monitor),
            progress=False,
            history_on_host=history_on_host,
        )


def decode_audio(parts: Parts, monitor: Monitor, audio: torch.Tensor) -> torch.Tensor:
    """Samples [2, m] at 44,100 Hz, float32 on the CPU."""
    with monitor.stage(AUDIO), parts.audio_decoder() as codec:
        monitor.loaded()
        samples = codec.samples(audio.to(parts.device))
        monitor.step(1, 1)
    return samples


def decode_video(
    parts: Parts, monitor: Monitor, video: torch.Tensor, write: Callable[[torch.Tensor], None], tiles: int
) -> None:
    """Decode window by window; ``write`` gets frames [n, H, W, 3] uint8 on the CPU while the next are decoded."""
    total = 4 * video.shape[2] - 3
    with monitor.stage(VIDEO), parts.video_decoder() as decoder:
        monitor.loaded()
        done = 0
        for frames in host_frames(decoder, video.to(parts.device), tiles):
            write(frames)
            done += len(frames)
            monitor.step(done, total)


def _steps_of(monitor: Monitor) -> Callable[[StepInfo], None]:
    return lambda info: monitor.step(info.step, info.steps, info.video, info.audio)


def _to(value: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if value is None else value.to(device)
