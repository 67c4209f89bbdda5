"""The arguments and results of RMSNorm with quantisation, and of the QKV product with its epilogue.

docs/OPS.md states every tensor, layout and rounding point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from happyhorse_fast.ops.quantize import BF16, E4M3, INT8
from happyhorse_fast.ops.runtime.checks import require, require_product_scales
from happyhorse_fast.ops.runtime.operation import Arguments
from happyhorse_fast.ops.runtime.row_tiles import ROW_TILE

HEAD_DIMS = (32, 64, 128)
MAX_CHANNELS = 8192
"""A program of `rmsnorm_quantize` holds a row in registers: 8192 float32 are 32 in each of 256 threads."""
NORMALISED = {"bf16": BF16, "int8": INT8, "fp8": E4M3}
"""Dtype of x that `rmsnorm_quantize` gives, by ``out``."""
OUTPUTS = {"bf16": BF16, "int8_qk": INT8, "fp8": E4M3}
"""Dtype of q and k that `qkv_linear` gives, by ``out``."""
QKV: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v, q_scale, k_scale, v_scale, gate."""


@dataclass(frozen=True)
class RmsnormQuantize(Arguments):
    """Arguments of :func:`ops.qkv.op.rmsnorm_quantize`."""

    MUTATES: ClassVar[tuple[str, ...]] = ("hidden",)
    hidden: Tensor
    norm_weight: Tensor
    row_tiles: Tensor
    branch: Tensor | None = None
    out: str = "bf16"

    def check(self) -> None:
        """Hold the arguments against the contract."""
        hidden, device = self.hidden, self.hidden.device
        require("hidden", hidden, (torch.float32,), ("N", "C"), device=device, strided_rows=True)
        n, c = hidden.shape
        if c > MAX_CHANNELS:
            raise ValueError(f"hidden must have at most {MAX_CHANNELS} channels, got {c}")
        require("norm_weight", self.norm_weight, (torch.float32,), ("E", c), device=device)
        require("row_tiles", self.row_tiles, (torch.int32,), ("tiles", 3), device=device)
        if self.branch is not None:
            require("branch", self.branch, (BF16,), (n, c), device=device, strided_rows=True)
        if self.out not in NORMALISED:
            raise ValueError(f"out must be one of {', '.join(map(repr, NORMALISED))}; got {self.out!r}")

    def empty(self) -> tuple[Tensor, Tensor]:
        """x [N, C] and its scale."""
        hidden, scales = self.hidden, 0 if self.out == "bf16" else self.hidden.shape[0]
        x = torch.empty(hidden.shape, dtype=NORMALISED[self.out], device=hidden.device)
        return x, torch.empty(scales, dtype=torch.float32, device=hidden.device)


@dataclass(frozen=True)
class QkvLinear(Arguments):
    """Arguments of :func:`ops.qkv.op.qkv_linear`."""

    x: Tensor
    x_scale: Tensor | None
    weight: Tensor
    weight_scale: Tensor | None
    qk_norm: Tensor
    cos_sin: Tensor
    row_tiles: Tensor
    num_heads_q: int
    num_heads_kv: int
    out: str
    qk_scale: Tensor | None = None

    def check(self) -> None:
        """Hold the arguments against the contract."""
        x, x_scale, weight_scale, device = self.x, self.x_scale, self.weight_scale, self.x.device
        require("x", x, (BF16, INT8, E4M3), ("N", "C"), device=device, strided_rows=True)
        n, c = x.shape
        d = check_heads(self.cos_sin, n, self.num_heads_q, self.num_heads_kv, device)
        features = features_of(self.num_heads_q, self.num_heads_kv, d)
        require("weight", self.weight, (x.dtype,), ("E", features, c), device=device)
        experts = self.weight.shape[0]
        require("qk_norm", self.qk_norm, (torch.float32,), (experts, 2, d), device=device)
        require("row_tiles", self.row_tiles, (torch.int32,), ("tiles", 3), device=device)
        if x.dtype != BF16:
            require("x_scale", x_scale, (torch.float32,), (n,), device=device)
            require("weight_scale", weight_scale, (torch.float32,), (experts, features), device=device)
        elif x_scale is not None:
            raise ValueError(f"x_scale must be None or empty where x is bf16, got shape {list(x_scale.shape)}")
        elif weight_scale is not None:
            raise ValueError(f"weight_scale must be None where weight is bf16, got shape {list(weight_scale.shape)}")
        check_outputs(self.out, self.qk_scale, experts, device)

    def empty(self) -> QKV:
        """q, k, v, q_scale, k_scale, v_scale, gate."""
        return empty_qkv(self.cos_sin, self.num_heads_q, self.num_heads_kv, self.out)

    def epilogue(self, product: Tensor) -> QkNormRope:
        """Arguments of the epilogue of ``product``, rows of x times a weight."""
        scales = self.x_scale, self.weight_scale
        heads = self.num_heads_q, self.num_heads_kv
        return QkNormRope(product, *scales, self.qk_norm, self.cos_sin, self.row_tiles, *heads, self.out, self.qk_scale)


@dataclass(frozen=True)
class QkNormRope(Arguments):
    """Arguments of :func:`ops.qkv.op.qk_norm_rope`."""

    product: Tensor
    row_scale: Tensor | None
    column_scale: Tensor | None
    qk_norm: Tensor
    cos_sin: Tensor
    row_tiles: Tensor
    num_heads_q: int
    num_heads_kv: int
    out: str
    qk_scale: Tensor | None = None

    def check(self) -> None:
        """Hold the arguments against the contract."""
        product, device = self.product, self.product.device
        require("product", product, (BF16, torch.float32), ("N", "F"), device=device, strided_rows=True)
        n = product.shape[0]
        d = check_heads(self.cos_sin, n, self.num_heads_q, self.num_heads_kv, device)
        shape = (n, features_of(self.num_heads_q, self.num_heads_kv, d))
        require("product", product, (product.dtype,), shape, device=device, strided_rows=True)
        require("qk_norm", self.qk_norm, (torch.float32,), ("E", 2, d), device=device)
        require("row_tiles", self.row_tiles, (torch.int32,), ("tiles", 3), device=device)
        experts = self.qk_norm.shape[0]
        require_product_scales(product, self.row_scale, self.column_scale, experts)
        check_outputs(self.out, self.qk_scale, experts, device)

    def empty(self) -> QKV:
        """q, k, v, q_scale, k_scale, v_scale, gate."""
        return empty_qkv(self.cos_sin, self.num_heads_q, self.num_heads_kv, self.out)


def empty_qkv(cos_sin: Tensor, num_heads_q: int, num_heads_kv: int, out: str) -> QKV:
    """Results of `qkv_linear`, not yet written: q, k, v, q_scale, k_scale, v_scale, gate."""
    n, d = cos_sin.shape
    blocks = -(-n // ROW_TILE)
    none = (0,)
    codes = OUTPUTS[out]
    q_scale = {"bf16": none, "int8_qk": (n, num_heads_q), "fp8": (blocks,)}[out]
    k_scale = {"bf16": none, "int8_qk": (num_heads_kv, blocks), "fp8": (blocks,)}[out]
    v_shape = (num_heads_kv, d, blocks * ROW_TILE) if out == "fp8" else (n, num_heads_kv, d)
    v_scale = (num_heads_kv, blocks) if out == "fp8" else none

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=cos_sin.device)

    return (
        empty((n, num_heads_q, d), codes),
        empty((n, num_heads_kv, d), codes),
        empty(v_shape, E4M3 if out == "fp8" else BF16),
        empty(q_scale),
        empty(k_scale),
        empty(v_scale),
        empty((n, num_heads_q)),
    )


def features_of(num_heads_q: int, num_heads_kv: int, head_dim: int) -> int:
    """F, columns of the packed product: q, k, v, and the gates up to a whole head."""
    return (num_heads_q + 2 * num_heads_kv + -(-num_heads_q // head_dim)) * head_dim


def check_heads(cos_sin: Tensor, n: int, num_heads_q: int, num_heads_kv: int, device: torch.device) -> int:
    """Hold the heads and their rotation against the contract; the head dim."""
    require("cos_sin", cos_sin, (torch.float32,), (n, "D"), device=device)
    d = cos_sin.shape[1]
    if d not in HEAD_DIMS:
        raise ValueError(f"cos_sin must have D = 32, 64 or 128 columns (the head dim), got {d}")
    if num_heads_kv < 1 or num_heads_q < 1 or num_heads_q % num_heads_kv:
        raise ValueError(f"num_heads_q must be a multiple of num_heads_kv, got {num_heads_q} and {num_heads_kv}")
    return d


def check_outputs(
    out: str,
    qk_scale: Tensor | None,
    experts: int,
    device: torch.device,
) -> None:
    """Hold what decides how q, k and v are written against the contract."""
    if out not in OUTPUTS:
        raise ValueError(f"out must be one of {', '.join(map(repr, OUTPUTS))}; got {out!r}")
    if out == "fp8":
        require("qk_scale", qk_scale, (torch.float32,), (experts, 2), device=device)
    elif qk_scale is not None:
        raise ValueError(f'qk_scale must be None where out is "{out}", got shape {list(qk_scale.shape)}')
