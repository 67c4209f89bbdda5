"""Sources of a sampler's noise: a generator, a callable that replays a recorded run, or torch's global state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from happyhorse_fast.arguments import require_finite, require_tensor
from happyhorse_fast.parallel.group import Ranks

Draw: TypeAlias = Callable[[str, torch.Size], torch.Tensor]
"""(name, shape) -> standard normal tensor."""
Noise: TypeAlias = torch.Generator | Draw | None
"""Kinds of ``noise`` that a sampler takes; see :func:`noise_source`."""


def noise_source(noise: Noise, device: torch.device, dtype: torch.dtype, ranks: Ranks | None = None) -> Draw:
    """One function for every kind of ``noise``.

    Args:
        noise: A ``torch.Generator`` on the latents' device or on the CPU; a callable (name, shape) -> float32 tensor on
            any device, with names such as ``noise.video.0``; or None for torch's global generator.
        device: Of the latents.
        dtype: Of the latents.
        ranks: That share the model's sequences: every one draws, and takes what rank 0 drew.

    Returns:
        (name, shape) -> noise on ``device`` in ``dtype``. Whatever ``dtype`` is, generators draw float32, so a float64
        run sees the noise of a float32 run. What a callable returns is held against the shape, float32 (or ``dtype``)
        and finiteness.

    Raises:
        TypeError: ``noise`` is none of the three.
        ValueError: The generator is on a third device.
    """
    if noise is None or isinstance(noise, torch.Generator):
        draw = _seeded(noise, device, dtype)
    elif callable(noise):
        draw = _replayed(noise, device, dtype)
    else:
        raise TypeError(
            f"noise must be a torch.Generator, a callable (name, shape) -> tensor, or None; got {type(noise).__name__}"
        )
    if ranks is None:
        return draw
    # Of a copy: what is broadcast is written to.
    return lambda name, shape: ranks.broadcast(draw(name, shape).clone(memory_format=torch.contiguous_format))


def _seeded(generator: torch.Generator | None, device: torch.device, dtype: torch.dtype) -> Draw:
    where = device if generator is None else generator.device
    if where == torch.device(device.type):  # torch.Generator("cuda") says no index, a tensor there does
        where = device
    if where not in (device, torch.device("cpu")):
        raise ValueError(f"noise must be a generator on {device}, where the latents are, or on the CPU; got {where}")

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=where, dtype=torch.float32).to(device, dtype)

    return draw


def _replayed(replay: Draw, device: torch.device, dtype: torch.dtype) -> Draw:
    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        what = f'noise("{name}", {list(shape)})'
        value = require_tensor(what, replay(name, shape), shape, dtypes=(torch.float32, dtype))
        require_finite(what, value)
        return value.to(device, dtype)

    return draw
