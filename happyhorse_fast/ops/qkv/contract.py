"""The arguments and results of RMSNorm with quantisation, and of the QKV product with its epilogue.

docs/OPS.md states every tensor, layout and rounding point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from happyhorse_fast.kernels.launch import ROW_TILE
from happyhorse_fast.ops.quantize import ATTENTION, BF16, DTYPES, E4M3, INT8
from happyhorse_fast.ops.runtime.checks import HEAD_DIMS, require, require_product_scale
from happyhorse_fast.ops.runtime.operation import Arguments

MAX_CHANNELS = 8192
"""A program of `rmsnorm_quantize` holds a row in registers: 8192 float32 are 32 in each of 256 threads."""
QKV: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The results of `qkv_linear`."""
RESULTS = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "gate")
"""Their names."""


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
        if self.out not in DTYPES:
            raise ValueError(f"out must be one of {', '.join(map(repr, DTYPES))}; got {self.out!r}")

    def empty(self) -> tuple[Tensor, Tensor]:
        """x [N, C] and its scale."""
        hidden, scales = self.hidden, 0 if self.out == "bf16" else self.hidden.shape[0]
        x = torch.empty(hidden.shape, dtype=DTYPES[self.out], device=hidden.device)
        return x, torch.empty(scales, dtype=torch.float32, device=hidden.device)


def empty_qkv(given: QkvLinear | QkNormRope) -> QKV:
    """Results of `qkv_linear`, not yet written: q, k, v, q_scale, k_scale, v_scale, gate."""
    heads_q, heads_kv = given.num_heads_q, given.num_heads_kv
    of_qk, of_v = ATTENTION[given.out]
    n, d = given.cos_sin.shape
    blocks, none = -(-n // ROW_TILE), (0,)
    q_scale = {BF16: none, INT8: (n, heads_q), E4M3: (blocks,)}[of_qk]
    k_scale = {BF16: none, INT8: (heads_kv, blocks), E4M3: (blocks,)}[of_qk]

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=given.cos_sin.device)

    return (
        empty((n, heads_q, d), of_qk),
        empty((n, heads_kv, d), of_qk),
        empty((heads_kv, d, blocks * ROW_TILE) if of_v == E4M3 else (n, heads_kv, d), of_v),
        empty(q_scale),
        empty(k_scale),
        empty((heads_kv, blocks) if of_v == E4M3 else none),
        empty((n, heads_q)),
    )


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

    empty = empty_qkv

    def check(self) -> None:
        """Hold the arguments against the contract."""
        x, device = self.x, self.x.device
        require("x", x, (BF16, INT8, E4M3), ("N", "C"), device=device, strided_rows=True)
        n, c = x.shape
        experts, features = check_epilogue(self, n, device)
        weight = require("weight", self.weight, (x.dtype,), ("E", features, c), device=device)
        require("qk_norm", self.qk_norm, (torch.float32,), (len(weight), *self.qk_norm.shape[1:]), device=device)
        require_product_scale("x_scale", self.x_scale, (n,), "x", x, "None or empty")
        require_product_scale("weight_scale", self.weight_scale, (experts, features), "weight", weight)

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

    empty = empty_qkv

    def check(self) -> None:
        """Hold the arguments against the contract."""
        product, device = self.product, self.product.device
        require("product", product, (BF16, torch.float32), ("N", "F"), device=device, strided_rows=True)
        n = product.shape[0]
        experts, features = check_epilogue(self, n, device)
        require("product", product, (product.dtype,), (n, features), device=device, strided_rows=True)
        require_product_scale("row_scale", self.row_scale, (n,), "product", product)
        require_product_scale("column_scale", self.column_scale, (experts, features), "product", product)


def check_epilogue(given: QkvLinear | QkNormRope, n: int, device: torch.device) -> tuple[int, int]:
    """Hold what a product of ``n`` rows becomes q, k and v by against the contract; its experts E and features F."""
    heads_q, heads_kv, out, qk_scale = given.num_heads_q, given.num_heads_kv, given.out, given.qk_scale
    d = require("cos_sin", given.cos_sin, (torch.float32,), (n, "D"), device=device).shape[1]
    if d not in HEAD_DIMS:
        raise ValueError(f"cos_sin must have D = 32, 64 or 128 columns (the head dim), got {d}")
    if heads_kv < 1 or heads_q < 1 or heads_q % heads_kv:
        raise ValueError(f"num_heads_q must be a multiple of num_heads_kv, got {heads_q} and {heads_kv}")
    experts = require("qk_norm", given.qk_norm, (torch.float32,), ("E", 2, d), device=device).shape[0]
    require("row_tiles", given.row_tiles, (torch.int32,), ("tiles", 3), device=device)
    if out not in ATTENTION:
        raise ValueError(f"out must be one of {', '.join(map(repr, ATTENTION))}; got {out!r}")
    if out == "fp8":
        require("qk_scale", qk_scale, (torch.float32,), (experts, 2), device=device)
    elif qk_scale is not None:
        raise ValueError(f'qk_scale must be None where out is "{out}", got shape {list(qk_scale.shape)}')
    # q, k, v, and the gates up to a whole head.
    return experts, (heads_q + 2 * heads_kv + -(-heads_q // d)) * d
