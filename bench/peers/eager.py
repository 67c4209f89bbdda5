"""Every op as eager PyTorch computes it, unfused and in bf16: the first peer, and what ``torch.compile`` is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.cases import Case, padded_rows, token_ranges
from bench.inputs import Given
from happyhorse_fast.eager.attention import fused_attention
from happyhorse_fast.eager.qkv import rms_norm
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.linear.contract import ACTIVATIONS
from happyhorse_fast.ops.qkv.reference import epilogue
from happyhorse_fast.ops.runtime.row_tiles import joined

Function = Callable[[], object]


def prepare(case: Case, given: Given, *, compiled: bool = False) -> Function:
    """The op on bf16 inputs; what depends on the shape only is done here.

    Args:
        case: Its precision does not matter: eager PyTorch has no fp8.
        given: Inputs of the case's bf16 sibling.
        compiled: Run the arithmetic through ``torch.compile``.

    Raises:
        LookupError: Eager PyTorch has no such op.
    """

    def built(function: Callable[..., object]) -> Callable[..., object]:
        return torch.compile(function, dynamic=False) if compiled else function

    if case.op == "block_sparse_attention":
        return _attention(case, given, built)
    if case.op == "select_blocks":
        if compiled:
            raise LookupError("the choice of blocks builds its map with Python code between the operations")
        return lambda: select_blocks(given["q"], given["k"], given["selector"], keep=given["keep"], backend="reference")
    if case.op == "rmsnorm_quantize":
        function = built(_norm)
        return lambda: function(given["hidden"], given["norm_weight"][0])
    if case.op == "quantize_rows":
        raise LookupError("eager PyTorch has no int8 products to quantise for")
    parts = [(expert, slice(first, end)) for expert, first, end in joined(given["row_tiles"].tolist())]
    if case.op == "qkv_linear":
        return _qkv(given, parts, built)
    if case.op == "fp8_linear_residual":
        function = built(_add_product)
        return lambda: [function(given["hidden"][rows], given["x"][rows], given["weight"][e]) for e, rows in parts]
    activation = ACTIVATIONS[given["activation"]][0]
    function = built(lambda x, weight: activation(linear(x, weight).float()).bfloat16())
    return lambda: [function(given["x"][rows], given["weight"][e]) for e, rows in parts]


def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(hidden, weight).bfloat16()


def _add_product(hidden: Tensor, x: Tensor, weight: Tensor) -> None:
    hidden += linear(x, weight)


def _qkv(given: Given, parts: list[tuple[int, slice]], built: Callable[..., Callable[..., object]]) -> Function:
    heads = given["num_heads_q"], given["num_heads_kv"]

    def layer(x: Tensor, weight: Tensor, qk_norm: Tensor, cos_sin: Tensor) -> tuple[Tensor, ...]:
        q, k, v, gate = epilogue(linear(x, weight).float(), qk_norm, cos_sin, *heads)
        return q.bfloat16(), k.bfloat16(), v.bfloat16(), gate

    function = built(layer)
    return lambda: [
        function(given["x"][rows], given["weight"][e], given["qk_norm"][e], given["cos_sin"][rows]) for e, rows in parts
    ]


def _attention(case: Case, given: Given, built: Callable[..., Callable[..., object]]) -> Function:
    """As the eager model: one fused call over the keys of every run of queries, without padding."""
    if case.keep is not None:
        raise LookupError("eager PyTorch has no attention over chosen blocks")
    ranges = token_ranges(case.size, case.part == "window")
    rows = padded_rows(case.size).token_rows(given["q"].device)
    q, k, v, gate = (given[name][rows] for name in ("q", "k", "v", "gate"))
    function = built(lambda: fused_attention(q, k, v, ranges) * gate[..., None])
    return function
