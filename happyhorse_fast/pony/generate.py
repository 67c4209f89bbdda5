"""Generate pictures and sound from a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_tensor
from happyhorse_fast.config import LATENT_CHANNELS, PATCH
from happyhorse_fast.eager.sequence import Clip
from happyhorse_fast.pony.codec import FRAMES, SIDE, decode_audio, decode_video, encode_video
from happyhorse_fast.pony.prompt import TEXT_TOKENS, encode_text, parse
from happyhorse_fast.pony.weights import PONY, load_codecs
from happyhorse_fast.sampler import sample
from happyhorse_fast.sampler.steps import Denoiser
from happyhorse_fast.tokens import VAE_STRIDE

VIDEO_SHAPE = (1, LATENT_CHANNELS, (FRAMES - 1) // VAE_STRIDE[0] + 1, SIDE // VAE_STRIDE[1], SIDE // VAE_STRIDE[2])
AUDIO_SHAPE = (1, FRAMES, PONY.audio_in_channels)
CLIP = Clip(VIDEO_SHAPE[2], VIDEO_SHAPE[3] // PATCH[1], VIDEO_SHAPE[4] // PATCH[2], FRAMES, TEXT_TOKENS)
"""Token grid of every clip."""


@dataclass(frozen=True)
class PonyClip:
    """A clip: 49 frames at 24 fps, with sound at 12 kHz.

    Attributes:
        prompt: What it was made from.
        frames: [49, 128, 128, 3] float32 in 0..1.
        samples: [24500] float32 in -1..1; 500 per frame.
        video: [1, 48, 13, 8, 8] the latent of ``frames``.
        audio: [1, 49, 64] the latent of ``samples``.
    """

    prompt: str
    frames: torch.Tensor
    samples: torch.Tensor
    video: torch.Tensor
    audio: torch.Tensor


@ambient.independent
def encode_image(picture: torch.Tensor) -> torch.Tensor:
    """Encode a picture [128, 128, 3] in 0..1 to [1, 48, 1, 8, 8], the ``image`` of :func:`generate` and ``sample``.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Another shape.
    """
    value = require_tensor("picture", picture, (SIDE, SIDE, 3))
    return encode_video(load_codecs().video, value[None, None].float())


@ambient.independent
def noise_and_text(prompt: str, noise: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw the start of a clip: noise [1, 48, 13, 8, 8] and [1, 49, 64], and its text tokens.

    Raises:
        ValueError: ``prompt`` is not in the grammar.
    """
    text = encode_text(str(parse(prompt)))
    return torch.randn(VIDEO_SHAPE, generator=noise), torch.randn(AUDIO_SHAPE, generator=noise), text


def generate(
    model: Denoiser,
    prompt: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    image: torch.Tensor | None = None,
) -> PonyClip:
    """Sample and decode a clip; the same seed gives the same clip on the same machine.

    Args:
        model: The pony, from :func:`happyhorse_fast.pony.load_model`, accelerated or not.
        prompt: In the grammar of :mod:`happyhorse_fast.pony.prompt`.
        seed: Of all noise.
        steps: Denoising steps, 8 by default.
        image: [1, 48, 1, 8, 8] latent of the first frame, from :func:`encode_image`.

    Raises:
        ValueError: ``prompt`` is not in the grammar, or an argument is out of range.
    """
    noise = torch.Generator().manual_seed(seed)
    video, audio, text = (x.to(model.device) for x in noise_and_text(prompt, noise))
    image = None if image is None else image.to(model.device)
    video, audio = sample(model, video, audio, text, steps=steps, image=image, noise=noise, progress=False)
    codecs = load_codecs()
    frames = decode_video(codecs.video, video.float().cpu())[0]
    samples = decode_audio(codecs.audio, audio.float().cpu())[0]
    return PonyClip(prompt, frames, samples, video, audio)
