"""What the tests of the linear layers share: inputs in every format, and what they stand for in float64."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear

from happyhorse_fast.ops.linear import op as ops
from happyhorse_fast.ops.linear.contract import ACTIVATIONS
from happyhorse_fast.ops.quantize import E4M3_MAX, code_scale, dequantize, e4m3_rows, quantize_static

E4M3 = torch.float8_e4m3fn
# Rows of video, audio and text: every remainder by 128 that is special, boundaries off the 128 grid.
ROWS = {1: (257,), 3: (128, 129, 127)}
EPILOGUES = ("plain", "residual", "swiglu7", "gelu7")
KERNELS = ("triton", "cuda")
# (epilogue, backend): the CUDA kernels have the activations only.
IMPLEMENTED = [(e, b) for e in EPILOGUES for b in (*KERNELS, "reference") if b != "cuda" or e in ACTIVATIONS]


def row_tiles(sizes) -> torch.Tensor:
    tiles, start = [], 0
    for expert, size in enumerate(sizes):
        tiles += [(expert, start + at, start + min(at + 128, size)) for at in range(0, size, 128)]
        start += size
    return torch.tensor(tiles, dtype=torch.int32)


class Case:
    """Inputs of an op, quantised where fp8 (``static``: by one scale), and what they stand for in float64."""

    def __init__(self, sizes, f, k, fp8, static=False, seed=0):
        gen = torch.Generator().manual_seed(seed)
        n, experts = sum(sizes), len(sizes)
        # Rows, channels and experts of different size, so that a scale read from the wrong place shows.
        x = torch.randn(n, k, generator=gen) * torch.rand(n, 1, generator=gen).mul(4).exp2()
        weight = torch.randn(experts, f, k, generator=gen) / math.sqrt(k)
        weight *= torch.rand(experts, f, 1, generator=gen).add(0.5) * torch.arange(1, experts + 1)[:, None, None]
        self.hidden = torch.randn(n, f, generator=gen)
        self.tiles = row_tiles(sizes)
        self.expert = torch.repeat_interleave(torch.arange(experts), torch.tensor(sizes))
        if fp8:
            self.x, self.x_scale = e4m3_rows(x)
            if static:
                self.x_scale = code_scale(x.abs().amax(), E4M3_MAX).reshape(1)
                self.x = quantize_static(x, self.x_scale)
            self.weight, self.weight_scale = e4m3_rows(weight)
            self.wide_x = dequantize(self.x, self.x_scale, torch.float64)
            self.wide_weight = dequantize(self.weight, self.weight_scale, torch.float64)
        else:
            self.x, self.x_scale = x.bfloat16(), None
            self.weight, self.weight_scale = weight.bfloat16(), None
            self.wide_x, self.wide_weight = self.x.double(), self.weight.double()
        self.sizes = sizes

    @property
    def arguments(self):
        return self.x, self.x_scale, self.weight, self.weight_scale, self.tiles

    def exact(self) -> torch.Tensor:
        """[N, F] float64."""
        return torch.cat([x @ w.T for x, w in zip(self.wide_x.split(self.sizes), self.wide_weight, strict=True)])

    def eager(self) -> torch.Tensor:
        """[N, F] bf16, as torch computes it."""
        return torch.cat([linear(x, w) for x, w in zip(self.x.split(self.sizes), self.weight, strict=True)])


def run_epilogue(case, epilogue, out_fp8=False, backend="triton"):
    if epilogue == "plain":
        return ops.fp8_linear(*case.arguments, backend=backend)
    if epilogue == "residual":
        hidden = case.hidden.clone()
        assert ops.fp8_linear_residual(*case.arguments, hidden, backend=backend) is None
        return hidden
    return ops.fp8_linear_activation(*case.arguments, epilogue, out_fp8, backend=backend)
