"""Distances between two clips: PSNR and SSIM of pictures, log-spectral distance of sound."""

from __future__ import annotations

import torch
from torch.nn.functional import conv2d

from happyhorse_fast import ambient
from happyhorse_fast.pony.codec import FRAME_SAMPLES

MOST_DB = 100.0
"""PSNR at which two pictures count as equal: a hundredth of an 8-bit step is 88 dB."""
FLOOR_DB = -60.0
"""Of a sound's largest power; what is below counts as silence."""
_WINDOW, _SIGMA = 11, 1.5  # pixels
_K1, _K2 = 0.01, 0.03


@ambient.independent
def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio over each clip, at most 100 dB.

    Args:
        a: [B, ...] in 0..1.
        b: Likewise.

    Returns:
        [B] dB.
    """
    error = (a - b).square().flatten(1).mean(dim=1)
    return (-10 * error.clamp(min=1e-30).log10()).clamp(max=MOST_DB)


@ambient.independent
def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture: Wang et al., "Image quality assessment", 2004, equations 13 and 17.

    With their constants, Gaussian windows of 11 x 11 pixels of sigma 1.5, and no padding; the mean over RGB.

    Args:
        a: [F, H, W, 3] in 0..1, H and W at least 11.
        b: Likewise.

    Returns:
        [F], 1 for equal pictures.
    """
    place = torch.arange(_WINDOW, device=a.device) - _WINDOW // 2
    weight = torch.exp(-place.float().square() / (2 * _SIGMA**2))
    weight /= weight.sum()

    def local_mean(x: torch.Tensor) -> torch.Tensor:  # [F, H, W, 3] -> [F * 3, 1, H - 10, W - 10]
        planes = x.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1)
        return conv2d(conv2d(planes, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))

    def of_picture(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        mean_a, mean_b = local_mean(a), local_mean(b)
        variance_a, variance_b = local_mean(a * a) - mean_a.square(), local_mean(b * b) - mean_b.square()
        covariance = local_mean(a * b) - mean_a * mean_b
        c1, c2 = _K1**2, _K2**2
        index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        index /= (mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2)
        return index.mean()

    # One by one: 49 at once take four times as long, in page faults.
    return torch.stack([of_picture(*pair) for pair in zip(a.split(1), b.split(1), strict=True)])


def log_spectral_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of log power spectra in 42 ms windows, both floored below the peak of ``a``.

    Args:
        a: [B, samples] in -1..1 at 12 kHz.
        b: Likewise.

    Returns:
        [B] dB.
    """
    window = torch.hann_window(FRAME_SAMPLES)

    def spectrum(x: torch.Tensor) -> torch.Tensor:
        power = torch.stft(x, len(window), len(window) // 2, window=window, return_complex=True).abs().square()
        return 10 * power.clamp(min=1e-12).log10()

    first, second = spectrum(a), spectrum(b)
    floor = first.amax(dim=(1, 2), keepdim=True) + FLOOR_DB
    return (first.maximum(floor) - second.maximum(floor)).square().mean(dim=(1, 2)).sqrt()
