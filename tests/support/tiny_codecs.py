"""Small random codecs of diffusers, in the folder layouts in which the published ones come."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from happyhorse_fast.pipeline.turbo import LATENT_MEAN, LATENT_STD


def save_wan(folder: Path) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=list(LATENT_MEAN),
        latents_std=list(LATENT_STD),
    ).save_pretrained(folder)


def save_oobleck(folder: Path) -> None:
    from diffusers import AutoencoderOobleck

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm's
        vae = AutoencoderOobleck(encoder_hidden_size=128, channel_multiples=[1, 1, 1, 1, 1], decoder_channels=8)
    vae.save_pretrained(folder)
