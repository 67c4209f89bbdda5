"""The two activations of the MLP, with its published rounding points."""

from __future__ import annotations

import torch

LIMIT = 7.0
ALPHA = 1.702


def gelu7(x: torch.Tensor) -> torch.Tensor:
    """a * sigmoid(1.702 a) with a = min(x, 7)."""
    a = x.clamp(max=LIMIT)
    return a * torch.sigmoid(ALPHA * a)


def swiglu7(x: torch.Tensor) -> torch.Tensor:
    """a * sigmoid(1.702 a) * (b + 1), a = min(x[even], 7), b = clamp(x[odd], -7, 7); [..., 2F] -> [..., F]."""
    a, b = x[..., ::2].clamp(max=LIMIT), x[..., 1::2].clamp(-LIMIT, LIMIT)
    return a * torch.sigmoid(ALPHA * a) * (b + 1)
