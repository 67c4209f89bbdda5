"""Partial 3D + 1D rotary embedding: three axes for video, one shared time axis for audio."""

from __future__ import annotations

import torch

from happyhorse_fast import ambient


def frequency_bands(head_dim: int, device: torch.device | None = None) -> torch.Tensor:
    """[B] float32, B = head_dim / 8: 10000^(-i/B). The same operations as the public code, so the same bits."""
    count = head_dim // 8
    place = torch.arange(count, dtype=torch.int64, device=device).to(torch.float32)
    if place.is_meta:
        return place  # arithmetic there loads torch's tracer
    exponent = place / count
    return 1.0 / (10000.0**exponent)


@ambient.independent
def rotary_phases(coords: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    """Sine and cosine of every token's phases.

    phase[axis, i] = (coordinate - centre) * scale * bands[i], scale = (reference - 1) / (size - 1) per axis and 1 where
    both are 1; rows and columns are centred by (size - 1) / 2, time is not.

    Args:
        coords: [N, 9] float32, see :func:`happyhorse_fast.eager.sequence.coordinates`.
        bands: [B].

    Returns:
        [N, 6B] in the dtype of ``coords``: 3B sines, then 3B cosines.

    Raises:
        ValueError: A grid of size 1 with a reference of several has no scale.
    """
    place, size, reference = coords[:, :3], coords[:, 3:6], coords[:, 6:9]
    single = (size == 1) & (reference == 1)
    scale = torch.where(single, torch.ones_like(size), (reference - 1) / (size - 1))
    readable = not torch.compiler.is_compiling() and not coords.is_meta and type(coords) is torch.Tensor
    if readable and not bool(torch.isfinite(scale).all()):
        raise ValueError("coords must not have a grid of size 1 with a reference grid of several: it has no scale")
    centre = (size - 1) / 2 * torch.tensor([0.0, 1.0, 1.0], dtype=size.dtype, device=size.device)
    phase = ((place - centre) * scale).unsqueeze(-1) * bands.to(coords.dtype)
    return torch.cat([phase.sin().flatten(1), phase.cos().flatten(1)], dim=1)


def apply_rotary(x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """Rotate the first 6B channels of every head in half-split pairs (x[0:3B], x[3B:6B]); the rest pass through.

    Args:
        x: [N, heads, D].
        phases: [N, 6B], sines then cosines.

    Returns:
        [N, heads, D] in the dtype of ``x``.
    """
    half = phases.shape[1] // 2
    sin, cos = phases[:, None, :half], phases[:, None, half:]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
