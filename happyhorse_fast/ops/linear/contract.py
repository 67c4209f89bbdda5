"""The arguments and results of the linear layers with their epilogues.

docs/OPS.md states every tensor, layout and rounding point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from happyhorse_fast.eager.mlp import LIMIT, gelu7, swiglu7
from happyhorse_fast.kernels.launch import ROW_TILE
from happyhorse_fast.ops.quantize import BF16, E4M3, E4M3_MAX, INT8
from happyhorse_fast.ops.runtime.checks import require, require_product_scale
from happyhorse_fast.ops.runtime.operation import Arguments

ACTIVATIONS = {"swiglu7": (swiglu7, 2, LIMIT * (LIMIT + 1)), "gelu7": (gelu7, 1, LIMIT)}
"""Name -> (function, columns of the product per output, bound of its outputs)."""


@dataclass(frozen=True)
class Product(Arguments):
    """Operands of x . weight of each row's expert; :func:`ops.linear.op.fp8_linear` states them."""

    x: Tensor
    x_scale: Tensor | None
    weight: Tensor
    weight_scale: Tensor | None
    row_tiles: Tensor

    def check(self) -> None:
        """Hold the arguments against the contract."""
        x, device = self.x, self.x.device
        require("x", x, (BF16, INT8, E4M3), ("N", "K"), device=device)
        n, k = x.shape
        require("weight", self.weight, (x.dtype,), ("E", "F", k), device=device)
        require("row_tiles", self.row_tiles, (torch.int32,), ("tiles", 3), device=device)
        require_product_scale("x_scale", self.x_scale, (f"{n} or 1",), "x", x, "None or empty")
        require_product_scale("weight_scale", self.weight_scale, self.weight.shape[:2], "weight", self.weight)
        if self.x_scale is not None and self.x_scale.shape[0] not in (1, n):
            raise ValueError(
                f"x_scale must be of shape [{n} or 1], one per row or one for all, got {list(self.x_scale.shape)}"
            )


@dataclass(frozen=True)
class Linear(Product):
    """Arguments of `fp8_linear`."""

    def empty(self) -> Tensor:
        """[N, F] bf16."""
        return torch.empty((self.x.shape[0], self.weight.shape[1]), dtype=BF16, device=self.x.device)


@dataclass(frozen=True)
class LinearResidual(Product):
    """Arguments of `fp8_linear_residual`."""

    MUTATES: ClassVar[tuple[str, ...]] = ("hidden",)
    hidden: Tensor

    def check(self) -> None:
        """Hold the arguments against the contract."""
        super().check()
        shape = (self.x.shape[0], self.weight.shape[1])
        require("hidden", self.hidden, (torch.float32,), shape, device=self.x.device)

    def empty(self) -> None:
        """Nothing: hidden is changed."""


@dataclass(frozen=True)
class LinearActivation(Product):
    """Arguments of `fp8_linear_activation`."""

    activation: str
    fp8: bool

    def check(self) -> None:
        """Hold the arguments against the contract."""
        super().check()
        check_activation(self.activation, "weight", self.weight.shape[1])
        if self.fp8 and self.x.dtype == INT8:
            raise ValueError("fp8 must be False where x is int8: the result is bf16, for quantize_rows")

    def empty(self) -> Tensor:
        """y [N, K']."""
        return empty_activated(self.x.shape[0], self.weight.shape[1], self.activation, self.fp8, self.x.device)


@dataclass(frozen=True)
class ActivationQuantize(Arguments):
    """Arguments of `activation_quantize`."""

    product: Tensor
    row_scale: Tensor | None
    column_scale: Tensor | None
    row_tiles: Tensor
    activation: str
    fp8: bool

    def check(self) -> None:
        """Hold the arguments against the contract."""
        product, device = self.product, self.product.device
        require("product", product, (BF16, torch.float32), ("N", "F"), device=device, strided_rows=True)
        require("row_tiles", self.row_tiles, (torch.int32,), ("tiles", 3), device=device)
        require_product_scale("row_scale", self.row_scale, product.shape[:1], "product", product)
        require_product_scale("column_scale", self.column_scale, ("E", product.shape[1]), "product", product)
        check_activation(self.activation, "product", product.shape[1])

    def empty(self) -> Tensor:
        """y [N, K']."""
        rows, features = self.product.shape
        return empty_activated(rows, features, self.activation, self.fp8, self.product.device)


def empty_activated(rows: int, features: int, activation: str, fp8: bool, device: torch.device) -> Tensor:
    """The activation of a product [rows, features], not yet written: [rows, K']."""
    columns = features // ACTIVATIONS[activation][1]
    return torch.empty((rows, columns), dtype=E4M3 if fp8 else BF16, device=device)


def activation_scale(activation: str) -> float:
    """Scale of an activation's e4m3 codes: its bound / 448, 0.125 of swiglu7 and 1/64 of gelu7.

    Both are powers of two, so that y / scale is exact, and so is y * (1 / scale).
    """
    return ACTIVATIONS[activation][2] / E4M3_MAX


def static_scale(activation: str, fp8: bool, device: torch.device) -> Tensor:
    """Scale that an activation's result comes with: float32 [1], or [0] of a bf16 one."""
    if not fp8:
        return torch.empty(0, dtype=torch.float32, device=device)
    return torch.full((1,), activation_scale(activation), dtype=torch.float32, device=device)


def check_activation(activation: str, name: str, features: int) -> None:
    """Hold an activation, and the columns that argument ``name`` gives it, against the contract."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}")
    if features % ROW_TILE:
        raise ValueError(f"{name} must have a multiple of 128 features F before an activation, got {features}")
