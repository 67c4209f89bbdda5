"""The Wan 2.2 video codec of diffusers: pictures into normalized latents, and latents into frames one latent a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from happyhorse_fast import ambient, optional
from happyhorse_fast.arguments import CheckpointError, require_tensor, require_whole
from happyhorse_fast.checkpoint.header import TensorEntry, read_headers
from happyhorse_fast.config import LATENT_CHANNELS
from happyhorse_fast.pipeline.codec_files import (
    CONFIG,
    Codec,
    empty_codec,
    read_json,
    require_settings,
    require_tensors,
)
from happyhorse_fast.tokens import VAE_STRIDE

WHAT = "Wan 2.2's video codec"
SETTINGS = {
    "_class_name": "AutoencoderKLWan",
    "z_dim": LATENT_CHANNELS,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_temporal": VAE_STRIDE[0],
    "scale_factor_spatial": VAE_STRIDE[1],
}
"""What the config must say; widths and depths are free, the weights are held against them."""
IGNORED = ("clip_output",)
"""Settings of the published config that no version of diffusers has; it always clips."""


class WanCodec(Codec):
    """``AutoencoderKLWan``: the folder ``vae`` of Wan2.2-TI2V-5B-Diffusers, its weights in one file or in shards.

    In bf16 at 1080p a picture is encoded in 2.4 GB and a clip of any length decoded in 23.6 GB, weights included (fake
    tensors, no cuDNN workspace); at 540p in 0.8 and 6.0 GB.

    Attributes:
        mean: [1, 48, 1, 1, 1] of the latents, in the weights' dtype, as the published code holds it.
        inverse_std: [1, 48, 1, 1, 1], 1 / std computed in the weights' dtype.
    """

    HALVES: ClassVar = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
    DTYPE: ClassVar = torch.bfloat16

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        weight = next(vae.parameters())
        mean, std = (
            torch.tensor(values, dtype=torch.float32).to(weight.device, weight.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.mean, self.inverse_std = mean, 1.0 / std

    @staticmethod
    def check(folder: Path) -> tuple[Any, dict[str, TensorEntry]]:
        """As :meth:`Codec.check` says."""
        settings, entries = _settings(folder), read_headers(folder)
        optional.require("diffusers", WHAT)
        from diffusers import AutoencoderKLWan

        vae = empty_codec(AutoencoderKLWan, settings, folder / CONFIG)
        require_tensors(vae.state_dict(), entries, folder)
        return vae, entries

    @ambient.independent
    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode a picture: the posterior's mean, normalized as the published code does it, in the weights' dtype.

        Args:
            pixels: [1, 3, 1, 16 H, 16 W] in -1..1, a floating-point dtype, on the codec's device.

        Returns:
            [1, 48, 1, H, W] float32.

        Raises:
            TypeError: ``pixels`` is no floating-point tensor.
            ValueError: A wrong shape or device, or the codec was loaded without its encoder.
        """
        self.require_half("encoder")
        require_tensor("pixels", pixels, (1, 3, 1, "16 H", "16 W"), device=self.device)
        mean = self.vae.encode(pixels.to(self.mean.dtype)).latent_dist.mode()
        return ((mean - self.mean) * self.inverse_std).float()

    def windows(self, latents: torch.Tensor, tiles: int = 1) -> Iterator[torch.Tensor]:
        """The frames of a clip, latent by latent: the library's own steps, without its copy of all frames so far.

        Args:
            latents: [1, 48, T, H, W], a floating-point dtype, on the codec's device.
            tiles: 1: attention in the codec's middle sees whole frames, so tiles would change the result.

        Returns:
            An iterator; each item is a tensor of its own, [1, 3, frames, 16 H, 16 W] in the weights' dtype, -1 to 1:
            first one frame, then 4 each.

        Raises:
            TypeError: ``latents`` is no floating-point tensor.
            ValueError: A wrong shape or device, ``tiles`` is not 1, or the codec was loaded without its decoder; all
                of them before any work.
        """
        self.require_half("decoder")
        require_whole("tiles", tiles, 1, 1)
        require_tensor("latents", latents, (1, LATENT_CHANNELS, "T", "H", "W"), device=self.device)
        return self._windows(latents)

    def _windows(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        self.vae.clear_cache()
        with torch.no_grad(), ambient.held():
            ready = self.vae.post_quant_conv(latents.to(self.mean.dtype) / self.inverse_std + self.mean)
        try:
            for index in range(latents.shape[2]):
                yield self._window(ready[:, :, index : index + 1], index == 0)
        finally:
            self.vae.clear_cache()  # which holds two frames of every layer

    @ambient.independent
    @torch.no_grad()
    def _window(self, latent: torch.Tensor, first: bool) -> torch.Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        self.vae._conv_idx = [0]
        frames = self.vae.decoder(latent, feat_cache=self.vae._feat_map, feat_idx=self.vae._conv_idx, first_chunk=first)
        return unpatchify(frames, patch_size=self.vae.config.patch_size).clamp_(-1, 1)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    settings = read_json(file)
    require_settings(file, settings, SETTINGS, WHAT)
    for name in ("latents_mean", "latents_std"):
        values = settings.get(name)
        if not isinstance(values, list) or len(values) != LATENT_CHANNELS:
            raise CheckpointError(f"{file}: {name} must be {LATENT_CHANNELS} numbers, got {values!r}")
    return {key: value for key, value in settings.items() if key not in IGNORED}
