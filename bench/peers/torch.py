"""Peers that are torch's own: eager PyTorch in bf16, the same compiled, and the library's attention and products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.cases import Case, padded_rows, token_ranges
from bench.inputs import Given
from bench.measure.roofline import bf16_product, fp8_product, int8_product
from bench.peers.peer import ATTENTION, LINEAR, NORM, WITHOUT_GATE, Function, Inputs, Peer
from happyhorse_fast.eager.attention import fused_attention
from happyhorse_fast.eager.qkv import rms_norm
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.linear.contract import ACTIVATIONS
from happyhorse_fast.ops.qkv.reference import epilogue
from happyhorse_fast.ops.runtime.row_tiles import joined

ON_GPUS_ALONE = "compiling takes 10 to 30 s a case on a CPU; timed on GPUs only"
"""40 cases would take longer than everything else together."""


def forget_compiled() -> None:
    """Start torch.compile afresh: after eight recompiles of one function it would run eagerly, without a word."""
    torch._dynamo.reset()


class Eager(Peer):
    """Plain PyTorch: every op unfused, in bf16."""

    name = "eager"
    ops = (*LINEAR, *ATTENTION, *NORM, "select_blocks")
    gpu = False

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        return eager(case, inputs.bf16)


class Compiled(Peer):
    """The same through ``torch.compile``."""

    name = "torch.compile"
    slow = True
    ops = (*LINEAR, *ATTENTION, *NORM)

    def available(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else ON_GPUS_ALONE

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        forget_compiled()
        return eager(case, inputs.bf16, compiled=True)

    def fits(self, case: Case) -> bool:
        # A window is 31 calls of attention, which compiles for minutes and is the same library's kernel in the end.
        return super().fits(case) and case.part != "window"


class Sdpa(Peer):
    """``scaled_dot_product_attention`` with one backend, dense, without the gate."""

    ops, parts = WITHOUT_GATE, ("dense",)

    def __init__(self, backend: str) -> None:
        self.backend, self.gpu = backend, backend != "FLASH_ATTENTION"
        self.name = f"sdpa {backend.removesuffix('_ATTENTION').lower()} (no gate)"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        backend = getattr(SDPBackend, self.backend)
        q, k, v = (inputs.bf16[name].transpose(0, 1)[None] for name in "qkv")
        grouped = self.backend != "EFFICIENT_ATTENTION"
        if not grouped:  # this backend takes one key/value head per query head
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scale = inputs.bf16["scale"]

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)

        return run


class Flex(Peer):
    """FlexAttention, compiled, over the very same blocks (``BlockMap.to_flex``), without the gate."""

    name = "flex_attention (no gate)"
    slow = True
    ops = ATTENTION

    def available(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else ON_GPUS_ALONE  # uncompiled it materialises all scores

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from torch.nn.attention.flex_attention import flex_attention

        given = inputs.bf16
        q, k, v = (given[name].transpose(0, 1)[None] for name in "qkv")
        block_mask = given["block_map"].to_flex(q.shape[1])
        forget_compiled()
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, block_mask=block_mask, scale=given["scale"], enable_gqa=True)


class Product(Peer):
    """A product of the library's alone, of one weight, without an epilogue."""

    ops = LINEAR
    product = staticmethod(bf16_product)

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.plan.experts == 1

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        _, features, columns = case.weight_shape(str(case.product))
        return self.product(case.rows, features, columns, inputs.device)


class ScaledMM(Product):
    """``torch._scaled_mm`` with a scale per row and per output channel."""

    name = "torch._scaled_mm (product only)"
    precisions = ("fp8", "int8")
    product = staticmethod(fp8_product)

    def available(self, device: torch.device) -> str | None:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "needs e4m3 tensor cores (sm_89 and later)"
        return super().available(device)


class IntMM(Product):
    """``torch._int_mm``: int32 sums without scales."""

    name = "torch._int_mm (product only)"
    precisions = ("int8",)
    product = staticmethod(int8_product)


class Bf16MM(Product):
    """The product in bf16 of the same shape, which a fused product of any format is held against."""

    name = "torch.mm bf16 (product only)"


def eager(case: Case, given: Given, *, compiled: bool = False) -> Function:
    """The op on bf16 inputs; what depends on the shape only is done here.

    Args:
        case: Its precision does not matter: eager PyTorch has no fp8.
        given: Inputs of the case's bf16 sibling.
        compiled: Run the arithmetic through ``torch.compile``.

    Raises:
        LookupError: Eager PyTorch has no attention over chosen blocks.
    """

    def built(function: Callable[..., object]) -> Callable[..., object]:
        return torch.compile(function, dynamic=False) if compiled else function

    if case.op == "block_sparse_attention":
        return _attention(case, given, built)
    if case.op == "select_blocks":
        return lambda: select_blocks(given["q"], given["k"], given["selector"], keep=given["keep"], backend="reference")
    if case.op == "rmsnorm_quantize":
        function = built(_norm)
        return lambda: function(given["hidden"], given["norm_weight"][0])
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
    return built(lambda: fused_attention(q, k, v, ranges) * gate[..., None])
