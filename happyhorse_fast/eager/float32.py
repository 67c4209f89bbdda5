"""Products in float32 that no setting of torch reaches, in a compiled or exported graph either.

Outside of a graph :func:`happyhorse_fast.ambient.independent` holds the settings; a graph cannot write them, and what
it runs later reads them again. So these products are ops there, whose bodies write them.
"""

from __future__ import annotations

from typing import Any

import torch

from happyhorse_fast import ambient


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``: x [..., K] . weight [F, K] + bias [F] -> [..., F]."""
    if x.dtype == torch.float32 and torch.compiler.is_compiling():
        return _product(x, weight.mT, bias)
    return torch.nn.functional.linear(x, weight, bias)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of batches of matrices: [..., M, K] . [..., K, N] -> [..., M, N]."""
    if a.dtype == torch.float32 and torch.compiler.is_compiling():
        return _product(a, b, None)
    return a @ b


@torch.library.custom_op("happyhorse_fast::float32_product", mutates_args=())
def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with ambient.held():
        return torch.nn.functional.linear(a, b.mT, bias) if b.dim() == 2 else a @ b


@_product.register_fake
def _(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a, b = ctx.saved_tensors
    wants, rows = ctx.needs_input_grad, grad.flatten(0, -2)
    return (
        matmul(grad, b.mT) if wants[0] else None,
        (matmul(a.flatten(0, -2).mT, rows) if b.dim() == 2 else matmul(a.mT, grad)) if wants[1] else None,
        rows.sum(0) if wants[2] else None,
    )


_product.register_autograd(_backward, setup_context=_keep)
