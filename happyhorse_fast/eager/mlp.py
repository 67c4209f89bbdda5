"""The two activations of the MLP, with its published rounding points."""

from __future__ import annotations

import torch

from happyhorse_fast import ambient
from happyhorse_fast.eager.float32 import linear

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


@ambient.independent
def mlp(
    x: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor, *, gated: bool, stream: torch.dtype
) -> torch.Tensor:
    """Up projection, activation in the stream's dtype, down projection.

    Args:
        x: [M, hidden], already normalised and rounded to the compute dtype.
        up_weight: [2F, hidden] with gate and linear interleaved (``gated``), or [F, hidden].
        down_weight: [hidden, F].
        gated: SwiGLU7 rather than GELU7.
        stream: Dtype of the residual stream, in which the activation runs.

    Returns:
        [M, hidden] in the stream's dtype.
    """
    up = linear(x, up_weight.to(x.dtype)).to(stream)
    activated = (swiglu7(up) if gated else gelu7(up)).to(x.dtype)
    return linear(activated, down_weight.to(x.dtype)).to(stream)
