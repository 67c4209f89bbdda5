"""Stable Audio's codec of diffusers: latents into stereo sound and back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch

from happyhorse_fast import ambient, optional
from happyhorse_fast.arguments import require_tensor
from happyhorse_fast.checkpoint.header import TensorEntry
from happyhorse_fast.pipeline.audio_file import AUDIO_CHANNELS, CHANNELS, WHAT, describe
from happyhorse_fast.pipeline.codec_files import Codec, require_tensors
from happyhorse_fast.pipeline.sound import LATENT_SAMPLES, SAMPLE_RATE, resample

WINDOW_SECONDS = 29
"""Longest sound that is encoded as a whole."""


class AudioCodec(Codec):
    """``AutoencoderOobleck`` with one or both of its halves, in float32; :meth:`load` makes one.

    A latent stands for 2048 samples of 51,200 Hz, 25 latents a second, though the codec was trained on 44,100 Hz: that
    is how the public model was trained. The latents are not normalized.

    Attributes:
        vae: The library's model.
    """

    HALVES: ClassVar = {"encoder": ("encoder",), "decoder": ("decoder",)}

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @classmethod
    @ambient.makes_tensors
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        *,
        encoder: bool = False,
        decoder: bool = True,
    ) -> AudioCodec:
        """Load the codec of stable-audio-open-1.0; all of it is checked, before any data are read.

        Args:
            folder: With ``config.json`` and ``diffusion_pytorch_model.safetensors``; or above such a folder ``vae``; or
                the root, where ``model.safetensors`` holds it among other parts.
            device: Where the weights go, straight from the files.
            encoder: Whether sound will be encoded; without, that half takes no memory.
            decoder: Whether latents will be decoded.

        Raises:
            CheckpointError: A file is missing, truncated or of another model; the message names it and the keys.
            ImportError: diffusers is not installed or does not import.
            ValueError: Neither half is asked for, or this machine does not have the device.
        """
        return cls(cls.filled(folder, device, torch.float32, encoder=encoder, decoder=decoder))

    @staticmethod
    def described(folder: Path) -> tuple[Any, dict[str, TensorEntry]]:
        """As :meth:`Codec.described` says."""
        source, settings, entries = describe(folder)
        optional.require("diffusers", WHAT)
        from diffusers import AutoencoderOobleck

        with torch.device("meta"), warnings.catch_warnings():
            # The library's own warning.
            warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
            vae = AutoencoderOobleck.from_config(settings)
        require_tensors(vae.state_dict(), entries, source)
        return vae, entries

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.vae.parameters()).device

    @ambient.independent
    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode to stereo sound.

        Args:
            latents: [1, A, 64], a floating-point dtype, on the codec's device.

        Returns:
            [2, 2048 A] float32 at 51,200 Hz, about -1 to 1, not clamped.

        Raises:
            TypeError: ``latents`` is no floating-point tensor.
            ValueError: A wrong shape or device, or the codec was loaded without its decoder.
        """
        self.require_half("decoder")
        require_tensor("latents", latents, (1, "A", AUDIO_CHANNELS), device=self.device)
        return self.vae.decode(latents.float().transpose(1, 2)).sample[0]

    def samples(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode to stereo sound at the rate of players, on the host.

        Args:
            latents: As :meth:`decode` takes them.

        Returns:
            [2, int(2048 A * 441 / 512)] float32 at 44,100 Hz, on the CPU.

        Raises:
            As :meth:`decode`.
        """
        return resample(self.decode(latents).cpu())

    @ambient.independent
    @torch.no_grad()
    def encode(
        self, sound: torch.Tensor, seconds: float | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Encode mono sound, heard on both sides: a sample of the posterior.

        Beyond 29 s in windows that overlap by half and are cross-faded linearly, as the published code does it; the
        last one is filled up with silence.

        Args:
            sound: [samples] at 51,200 Hz, -1 to 1, a floating-point dtype; on any device.
            seconds: What the sound is cut to, or filled up to with silence (the published code makes a shorter clip
                instead); None leaves it as it is.
            generator: Of the posterior's samples, window by window [1, 64, latents]; on the codec's device, or on the
                CPU for the same samples whatever the device. None for the device's own.

        Returns:
            [1, A, 64] float32 on the codec's device: a latent for every 2048 samples, rounded down; up where there
            are windows.

        Raises:
            TypeError: ``sound`` is no floating-point tensor.
            ValueError: A wrong shape, shorter than one latent, or the codec was loaded without its encoder.
        """
        self.require_half("encoder")
        require_tensor("sound", sound, ("samples",))
        wanted, window = len(sound) if seconds is None else int(seconds * SAMPLE_RATE), WINDOW_SECONDS * SAMPLE_RATE
        if wanted < LATENT_SAMPLES:
            raise ValueError(f"sound must have at least {LATENT_SAMPLES} samples, got {wanted}")
        heard = _exactly(sound.to(self.device, torch.float32), wanted)
        if wanted <= window:
            return self._encode_window(heard, generator)
        # Half a window is 362.5 latents: those of each window are placed at multiples of 363, as published.
        starts = range(0, wanted - window // 2, window // 2)
        windows = [_exactly(heard[start:], window) for start in starts]
        joined = cross_faded([self._encode_window(piece, generator) for piece in windows])
        return joined[:, : -(-wanted // LATENT_SAMPLES)]

    def _encode_window(self, sound: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        stereo = sound.expand(1, CHANNELS, -1)
        return self.vae.encode(stereo).latent_dist.sample(generator).transpose(1, 2)


def _exactly(sound: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` samples, silence where there are fewer."""
    return torch.nn.functional.pad(sound[:count], (0, max(0, count - len(sound))))


def cross_faded(windows: list[torch.Tensor]) -> torch.Tensor:
    """Join windows [1, A, C] whose halves overlap: in the second half one fades out, linearly, and the next fades in.

    Returns:
        [1, (n - 1) ceil(A / 2) + A, C] for n windows.
    """
    length = windows[0].shape[1]
    overlap = length // 2
    step = length - overlap
    joined = windows[0].new_zeros(1, (len(windows) - 1) * step + length, windows[0].shape[2])
    joined[:, :length] = windows[0]
    fade = (torch.arange(overlap, dtype=joined.dtype, device=joined.device) / overlap)[None, :, None]
    for index, window in enumerate(windows[1:], start=1):
        start = index * step
        shared = joined[:, start : start + overlap]
        shared.mul_(1 - fade).add_(fade * window[:, :overlap])
        joined[:, start + overlap : start + length] = window[:, overlap:]
    return joined
