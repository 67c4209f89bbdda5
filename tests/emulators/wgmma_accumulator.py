"""Hopper's tensor cores in e4m3, in plain torch: products are added with fewer bits than float32 has.

Published by two groups that measured it: DeepSeek-V3 (arXiv 2412.19437, section 3.5.2) and SageAttention2 (arXiv
2411.10958): 32 products and the accumulator are shifted to the largest exponent among them, what lies more than 13
fraction bits below is cut off, and 13 fraction bits go back to the accumulator. Products in bf16 are not affected.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from unittest import mock

import torch

FRACTION_BITS = 13
DEPTH = 32
"""Products that one instruction adds to an accumulator."""


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., M, K] @ b [..., K, N] of e4m3 values in float32, accumulated as by wgmma; nothing promoted on the way.

    "The largest exponent" is read as that of the largest number, the coarser reading: that of its factors' sum, as
    hardware may take it, is the same or one less.
    """
    total = torch.zeros(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    for first in range(0, a.shape[-1], DEPTH):
        part = slice(first, first + DEPTH)
        products = a[..., :, part, None] * b[..., None, part, :]
        step = step_below(torch.maximum(products.abs().amax(dim=-2), total.abs()))
        kept = products.mul_(step.reciprocal().unsqueeze(-2)).trunc_().sum(dim=-2)  # exact: 20 bits at most
        total = (kept + (total / step).trunc()) * step
        step = step_below(total.abs())
        total = (total / step).trunc() * step
    return total


def step_below(largest: torch.Tensor) -> torch.Tensor:
    """The last bit that is kept beside a number."""
    return torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1 - FRACTION_BITS)


@contextlib.contextmanager
def wgmma(which: Iterable[bool] = (True,)) -> Iterator[list[int]]:
    """Makes ``a @ b`` of plain torch, inside ops too, Hopper's product in e4m3; gives a list that counts them.

    Args:
        which: Over and over, whether a product is one of e4m3: by default every one is.
    """
    exact, take, count = torch.Tensor.__matmul__, itertools.cycle(which), [0]

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not next(take):
            return exact(a, b)
        count[0] += 1
        return matmul(a, b)

    with mock.patch.object(torch.Tensor, "__matmul__", product):
        yield count
