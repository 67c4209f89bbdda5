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
from happyhorse_fast.pipeline.codec_files import Codec, empty_codec, require_tensors
from happyhorse_fast.pipeline.sound import LATENT_SAMPLES, SAMPLE_RATE


class AudioCodec(Codec):
    """``AutoencoderOobleck`` of stable-audio-open-1.0.

    Its folder has ``config.json`` and ``diffusion_pytorch_model.safetensors``; or is above such a folder ``vae``; or is
    the root, where ``model.safetensors`` holds it among other parts.

    A latent stands for 2048 samples of 51,200 Hz, 25 latents a second, though the codec was trained on 44,100 Hz: that
    is how the public model was trained. The latents are not normalized.
    """

    HALVES: ClassVar = {"encoder": ("encoder",), "decoder": ("decoder",)}
    DTYPE: ClassVar = torch.float32

    @staticmethod
    def check(folder: Path) -> tuple[Any, dict[str, TensorEntry]]:
        """As :meth:`Codec.check` says."""
        source, settings, entries = describe(folder)
        optional.require("diffusers", WHAT)
        from diffusers import AutoencoderOobleck

        with warnings.catch_warnings():
            # The library's own warning.
            warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
            vae = empty_codec(AutoencoderOobleck, settings, source)
        require_tensors(vae.state_dict(), entries, source)
        return vae, entries

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

    @ambient.independent
    @torch.no_grad()
    def encode(
        self, sound: torch.Tensor, seconds: float | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Encode mono sound, heard on both sides: a sample of the posterior.

        Args:
            sound: [samples] at 51,200 Hz, -1 to 1, a floating-point dtype; on any device.
            seconds: What the sound is cut to, or filled up to with silence (the published code makes a shorter clip
                instead); None leaves it as it is.
            generator: Of the posterior's sample [1, 64, A]; on the codec's device, or on the CPU for the same sample
                whatever the device. None for the device's own.

        Returns:
            [1, A, 64] float32 on the codec's device: a latent for every 2048 samples, rounded down.

        Raises:
            TypeError: ``sound`` is no floating-point tensor.
            ValueError: A wrong shape, shorter than one latent, or the codec was loaded without its encoder.
        """
        self.require_half("encoder")
        require_tensor("sound", sound, ("samples",))
        wanted = len(sound) if seconds is None else int(seconds * SAMPLE_RATE)
        if wanted < LATENT_SAMPLES:
            raise ValueError(f"sound must have at least {LATENT_SAMPLES} samples, got {wanted}")
        heard = torch.nn.functional.pad(sound[:wanted], (0, max(0, wanted - len(sound))))
        stereo = heard.to(self.device, torch.float32).expand(1, CHANNELS, -1)
        return self.vae.encode(stereo).latent_dist.sample(generator).transpose(1, 2)
