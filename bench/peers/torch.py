"""What calls peers of torch's own: eager PyTorch in bf16, the same compiled, the library's attention and products."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.cases import Case, padded_rows, token_ranges
from bench.inputs import Given
from bench.measure.timing import Call
from happyhorse_fast.eager.attention import fused_attention
from happyhorse_fast.eager.qkv import rms_norm
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.linear.contract import ACTIVATIONS
from happyhorse_fast.ops.qkv.reference import epilogue
from happyhorse_fast.ops.runtime.row_tiles import joined


def eager(case: Case, given: Given, built: Callable[..., Callable[..., object]] = lambda function: function) -> Call:
    """Plain PyTorch: the op unfused, in bf16; what depends on the shape only is done here.

    Args:
        case: Its precision does not matter: eager PyTorch has no fp8.
        given: Of the case.
        built: What to do with the arithmetic before it is called.

    Raises:
        LookupError: Eager PyTorch has no attention over chosen blocks.
    """
    if case.op == "block_sparse_attention":
        return _attention(case, given, built)
    if case.op == "select_blocks":
        return lambda: select_blocks(given["q"], given["k"], given["selector"], keep=given["keep"], backend="reference")
    if case.op == "rmsnorm_quantize":
        function = built(lambda hidden, weight: rms_norm(hidden, weight).bfloat16())
        return lambda: function(given["hidden"], given["norm_weight"][0])
    parts = [(expert, slice(first, end)) for expert, first, end in joined(given["row_tiles"].tolist())]
    if case.op == "qkv_linear":
        return _qkv(given, parts, built)
    if case.op == "fp8_linear_residual":
        function = built(lambda hidden, x, weight: hidden.add_(linear(x, weight)))
        return lambda: [function(given["hidden"][rows], given["x"][rows], given["weight"][e]) for e, rows in parts]
    activation = ACTIVATIONS[given["activation"]][0]
    function = built(lambda x, weight: activation(linear(x, weight).float()).bfloat16())
    return lambda: [function(given["x"][rows], given["weight"][e]) for e, rows in parts]


def _qkv(given: Given, parts: list[tuple[int, slice]], built: Callable[..., Callable[..., object]]) -> Call:
    heads = given["num_heads_q"], given["num_heads_kv"]

    def layer(x: Tensor, weight: Tensor, qk_norm: Tensor, cos_sin: Tensor) -> tuple[Tensor, ...]:
        q, k, v, gate = epilogue(linear(x, weight).float(), qk_norm, cos_sin, *heads)
        return q.bfloat16(), k.bfloat16(), v.bfloat16(), gate

    function = built(layer)
    return lambda: [
        function(given["x"][rows], given["weight"][e], given["qk_norm"][e], given["cos_sin"][rows]) for e, rows in parts
    ]


def _attention(case: Case, given: Given, built: Callable[..., Callable[..., object]]) -> Call:
    """As the eager model: one fused call over the keys of every run of queries, without padding."""
    if case.keep is not None:
        raise LookupError("eager PyTorch has no attention over chosen blocks")
    ranges = token_ranges(case.size, case.part == "window")
    rows = padded_rows(case.size).token_rows(given["q"].device)
    q, k, v, gate = (given[name][rows] for name in ("q", "k", "v", "gate"))
    return built(lambda: fused_attention(q, k, v, ranges) * gate[..., None])


def compiled(case: Case, given: Given) -> Call:
    """The same through ``torch.compile``.

    Raises:
        LookupError: As :func:`eager`, and for a frame window.
    """
    if case.part == "window":
        raise LookupError("31 calls of attention compile for minutes, and are the same library's kernel in the end")
    torch._dynamo.reset()  # after eight recompiles of one function it would run eagerly, without a word
    return eager(case, given, functools.partial(torch.compile, dynamic=False))


def sdpa(backend: str, case: Case, given: Given) -> Call:
    """``scaled_dot_product_attention`` with one backend, dense, without the gate."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (given[name].transpose(0, 1)[None] for name in "qkv")
    grouped = backend != "EFFICIENT_ATTENTION"
    if not grouped:  # this backend takes one key/value head per query head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))

    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, scale=given["scale"], enable_gqa=grouped)

    return run


def flex(case: Case, given: Given) -> Call:
    """FlexAttention, compiled, over the very same blocks (``BlockMap.to_flex``), without the gate."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (given[name].transpose(0, 1)[None] for name in "qkv")
    block_mask = given["block_map"].to_flex(q.shape[1])
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=block_mask, scale=given["scale"], enable_gqa=True)


def product(maker: Callable[..., Call], case: Case, given: Given) -> Call:
    """A product of the library's alone, of one weight, without an epilogue: of `measure.roofline`."""
    _, features, columns = case.weight_shape(str(case.product))
    return maker(case.rows, features, columns, given["x"].device)
