"""Peers that are torch's own, and torchao's linear, which is made of a module of torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case
from bench.measure.roofline import bf16_product, fp8_product, int8_product
from bench.peers import eager
from bench.peers.peer import ATTENTION, LINEAR, NORM, WITHOUT_GATE, Function, Inputs, Peer

ON_GPUS_ALONE = "compiling takes 10 to 30 s a case on a CPU; timed on GPUs only"
"""40 cases would take longer than everything else together."""


def forget_compiled() -> None:
    """Start torch.compile afresh: after eight recompiles of one function it would run eagerly, without a word."""
    torch._dynamo.reset()


class Eager(Peer):
    """Plain PyTorch in bf16."""

    name = "eager"
    ops = (*LINEAR, *ATTENTION, *NORM, "select_blocks")
    gpu = False

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        return eager.prepare(case, inputs.bf16)


class Compiled(Peer):
    """The same through ``torch.compile``."""

    name = "torch.compile"
    slow = True
    ops = (*LINEAR, *ATTENTION, *NORM)

    def available(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else ON_GPUS_ALONE

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        forget_compiled()
        return eager.prepare(case, inputs.bf16, compiled=True)

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
    """A product of the library's alone, without an epilogue."""

    ops = LINEAR
    one_expert = True
    product = staticmethod(bf16_product)

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


class TorchAO(Peer):
    """torchao's dynamic row-wise fp8 linear, which quantises its bf16 input in the call; no epilogue."""

    name = "torchao fp8 row-wise (quantisation and product)"
    module, slow = "torchao", True
    ops, precisions, one_expert = LINEAR, ("fp8",), True

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        _, features, columns = case.weight_shape(str(case.product))
        module = torch.nn.Linear(columns, features, bias=False, dtype=torch.bfloat16, device=inputs.device)
        quantize_(module, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        forget_compiled()
        compiled, x = torch.compile(module), inputs.bf16["x"]

        def run() -> object:
            with torch.no_grad():
                return compiled(x)

        return run
