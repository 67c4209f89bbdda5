"""Noise levels of a run: evenly spaced, then shifted towards noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIGMA_MAX = float(np.float32(0.999))
"""Noise level that a run starts from, before the shift. The published schedulers keep it in float32 and go on from
there in float64; from 0.999 itself, levels differ in the last bit (the seventh of 8)."""


def unshifted_levels(steps: int) -> NDArray[np.float64]:
    """Levels that ``steps`` steps start from, without the shift: evenly spaced from 0.999 down, 0 left out; [steps]."""
    return np.linspace(SIGMA_MAX, 0.0, steps + 1)[:-1]


def noise_levels(steps: int, shift: float) -> list[float]:
    """Noise levels of a distilled run: s -> shift * s / (1 + (shift - 1) * s) of the even levels, and 0 at the end.

    Args:
        steps: Number of steps, at least 1.
        shift: More than 0; above 1 spends more steps at high noise.

    Returns:
        steps + 1 falling values, rounded to float32, as the published schedulers keep them.
    """
    even = unshifted_levels(steps)
    shifted = shift * even / (1 + (shift - 1) * even)
    return [float(s) for s in np.append(shifted, 0.0).astype(np.float32)]
