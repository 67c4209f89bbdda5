"""Muon: momentum whose matrices are made orthogonal before the step (Jordan et al., 2024)."""

from __future__ import annotations

import torch
from torch import nn

# Coefficients of the quintic Newton-Schulz iteration: they bring singular values of 0..1 to about 0.7..1.2 in 5 rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(gradient: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices of [E, rows, cols], roughly, in bf16."""
    a, b, c = QUINTIC
    x = gradient.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on weight matrices that stack experts along their rows; each expert is a matrix of its own.

    The update is scaled by 0.2 sqrt(max(rows, cols)), so that its size is AdamW's and one learning rate serves both.

    Args:
        weights: (parameter [experts * rows, cols], experts) pairs.
        lr: Learning rate.
        momentum: Nesterov momentum.
        weight_decay: Decoupled, times ``lr``.
    """

    def __init__(
        self, weights: list[tuple[nn.Parameter, int]], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        groups = [{"params": [p for p, e in weights if e == n], "experts": n} for n in sorted({e for _, e in weights})]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).unflatten(0, (group["experts"], -1))
                scale = 0.2 * max(update.shape[1:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(update).flatten(0, 1).to(p.dtype), alpha=-group["lr"] * scale)
