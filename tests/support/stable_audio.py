"""Stable Audio's codec in plain torch, by the names of the file of the whole model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import weight_norm


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.randn(channels) / 4), nn.Parameter(torch.randn(channels) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha, beta = (value.exp()[None, :, None] for value in (self.alpha, self.beta))
        return x + torch.sin(alpha * x).pow(2) / (beta + 1e-9)


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Unit(Layers):
    def __init__(self, channels: int, dilation: int) -> None:
        wide, narrow = conv(channels, channels, 7, padding=3 * dilation, dilation=dilation), conv(channels, channels, 1)
        super().__init__(Snake(channels), wide, Snake(channels), narrow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def conv(inputs: int, outputs: int, size: int, **how: Any) -> nn.Module:
    return weight_norm(nn.Conv1d(inputs, outputs, size, **how))


def units(channels: int) -> list[nn.Module]:
    return [Unit(channels, dilation) for dilation in (1, 3, 9)]


class Codec(nn.Module):
    def __init__(self, channels: tuple[int, int], multiples: list[int], strides: list[int]) -> None:
        super().__init__()
        steps = list(zip([1, *multiples], multiples, strides, strict=False))
        wide, narrow = channels
        down = [
            Layers(
                *units(wide * before),
                Snake(wide * before),
                conv(wide * before, wide * after, 2 * stride, stride=stride, padding=math.ceil(stride / 2)),
            )
            for before, after, stride in steps
        ]
        top = wide * multiples[-1]
        self.encoder = Layers(conv(2, wide, 7, padding=3), *down, Snake(top), conv(top, 128, 3, padding=1))
        up = [
            Layers(
                Snake(narrow * after),
                weight_norm(
                    nn.ConvTranspose1d(
                        narrow * after, narrow * before, 2 * stride, stride=stride, padding=math.ceil(stride / 2)
                    )
                ),
                *units(narrow * before),
            )
            for before, after, stride in reversed(steps)
        ]
        first = conv(64, narrow * multiples[-1], 7, padding=3)
        self.decoder = Layers(first, *up, Snake(narrow), conv(narrow, 2, 7, padding=3, bias=False))

    def sample(self, sound: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mean, scale = self.encoder(sound).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator)
        return noise * (nn.functional.softplus(scale) + 1e-4) + mean
