"""What others run in place of an op: each used where it is installed, and named as absent, with the reason, where not.

A peer gets the same shapes. Those that leave out part of an op's work say so in their name: their time is a lower
bound of what they would need. Calls are those of each project's public documentation.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from bench import eager
from bench.cases import DROP_IN, STEM, Case
from bench.inputs import Given, make

Function = Callable[[], object]
LINEAR = ("fp8_linear_activation", "fp8_linear_residual", "qkv_linear")
ATTENTION = (STEM,)
DENSE = (STEM, DROP_IN)
"""Attention without a gate is what peers that attend densely do."""
NORM = ("rmsnorm_quantize",)


class Inputs:
    """A case's inputs for peers: its bf16 sibling, made once on demand."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device, self.seed = case, device, seed
        self._bf16: Given | None = None

    @property
    def bf16(self) -> Given:
        """Inputs of the same case in bf16."""
        if self._bf16 is None:
            self._bf16 = make(dataclasses.replace(self.case, precision="bf16"), self.device, self.seed)
        return self._bf16


class Peer(ABC):
    """Another implementation of some ops.

    Attributes:
        name: Under which its times are reported.
        ops: Which ops it can stand in for.
        slow: Whether it compiles for seconds at its first call, so that it is timed after everything else, and on one
            set of inputs.
    """

    name: str
    ops: tuple[str, ...]
    slow: bool = False

    @abstractmethod
    def available(self, device: torch.device) -> str | None:
        """Why it cannot run here; None where it can."""

    def fits(self, case: Case) -> bool:
        """Whether it does this case's work."""
        return case.op in self.ops

    @abstractmethod
    def prepare(self, case: Case, inputs: Inputs) -> Function:
        """What to time; conversions of the inputs happen here.

        Raises:
            LookupError: It has no such form of the op.
        """


def missing(module: str) -> str | None:
    """Why a module cannot be imported; None where it is installed."""
    try:
        return None if importlib.util.find_spec(module) else f"{module} is not installed"
    except (ImportError, ValueError) as error:
        return f"{module} cannot be looked up: {error}"


def needs_gpu(device: torch.device) -> str | None:
    """Why a CUDA-only peer cannot run."""
    return None if device.type == "cuda" else "needs a GPU"


def forget_compiled() -> None:
    """Start torch.compile afresh: after eight recompiles of one function it would run eagerly, without a word."""
    torch._dynamo.reset()


class Eager(Peer):
    """Plain PyTorch in bf16."""

    name = "eager"
    ops = (*LINEAR, *ATTENTION, *NORM, "select_blocks")

    def available(self, device: torch.device) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        return eager.prepare(case, inputs.bf16)


class Compiled(Peer):
    """The same through ``torch.compile``."""

    name = "torch.compile"
    slow = True
    ops = (*LINEAR, *ATTENTION, *NORM)

    def available(self, device: torch.device) -> str | None:
        # 10 to 30 s a case on one core: 40 cases would take longer than everything else together.
        return None if device.type == "cuda" else "compiling takes 10 to 30 s a case on a CPU; timed on GPUs only"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        forget_compiled()
        return eager.prepare(case, inputs.bf16, compiled=True)

    def fits(self, case: Case) -> bool:
        # A window is 31 calls of attention, which compiles for minutes and is the same library's kernel in the end.
        return super().fits(case) and case.part != "window"


class Sdpa(Peer):
    """``scaled_dot_product_attention`` with one backend, dense, without the gate."""

    ops = DENSE

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"sdpa {backend.removesuffix('_ATTENTION').lower()} (no gate)"

    def available(self, device: torch.device) -> str | None:
        if device.type == "cuda":
            return None
        return None if self.backend == "FLASH_ATTENTION" else "needs a GPU"

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.part == "dense"

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
        # Uncompiled it materialises all scores.
        return None if device.type == "cuda" else "compiling takes 10 to 30 s a case on a CPU; timed on GPUs only"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from torch.nn.attention.flex_attention import flex_attention

        given = inputs.bf16
        q, k, v = (given[name].transpose(0, 1)[None] for name in "qkv")
        block_mask = given["block_map"].to_flex(q.shape[1])
        forget_compiled()
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, block_mask=block_mask, scale=given["scale"], enable_gqa=True)


class ScaledMM(Peer):
    """``torch._scaled_mm`` with a scale per row and per output channel: the product alone, no epilogue."""

    name = "torch._scaled_mm (product only)"
    ops = LINEAR

    def available(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "row-wise scales need a GPU"
        if torch.cuda.get_device_capability(device) < (8, 9):
            return "needs e4m3 tensor cores (sm_89 and later)"
        return None

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.precision in ("fp8", "int8") and case.plan.experts == 1

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from bench.roofline import fp8_product

        _, features, columns = case.weight_shape(str(case.product))
        return fp8_product(case.rows, features, columns, inputs.device)


class IntMM(Peer):
    """``torch._int_mm``: the product alone, int32 sums without scales."""

    name = "torch._int_mm (product only)"
    ops = LINEAR

    def available(self, device: torch.device) -> str | None:
        return needs_gpu(device)

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.precision == "int8" and case.plan.experts == 1

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from bench.roofline import int8_product

        _, features, columns = case.weight_shape(str(case.product))
        return int8_product(case.rows, features, columns, inputs.device)


class Bf16MM(Peer):
    """The library's bf16 product of the same shape: what a fused product is held against; no epilogue."""

    name = "torch.mm bf16 (product only)"
    ops = LINEAR

    def available(self, device: torch.device) -> str | None:
        return needs_gpu(device)

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.plan.experts == 1

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from bench.roofline import bf16_product

        _, features, columns = case.weight_shape(str(case.product))
        return bf16_product(case.rows, features, columns, inputs.device)


class TorchAO(Peer):
    """torchao's dynamic row-wise fp8 linear, which quantises its bf16 input in the call; no epilogue."""

    name = "torchao fp8 row-wise (quantisation and product)"
    slow = True
    ops = LINEAR

    def available(self, device: torch.device) -> str | None:
        return needs_gpu(device) or missing("torchao")

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.precision == "fp8" and case.plan.experts == 1

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


def all_peers() -> Iterator[Peer]:
    """Every peer there is, installed or not, in the order they are timed in."""
    from bench import peers_external as external

    yield Eager()
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        yield Sdpa(backend)
    yield ScaledMM()
    yield IntMM()
    yield Bf16MM()
    yield from external.PEERS
    yield Flex()
    yield TorchAO()
    yield Compiled()


def split(peers: Iterable[Peer], device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """(those that can run here, reasons of those that cannot by name)."""
    usable, absent = [], {}
    for peer in peers:
        reason = peer.available(device)
        if reason is None:
            usable.append(peer)
        else:
            absent[peer.name] = reason
    return usable, absent
