"""Every peer there is: each used where it is installed, and named as absent, with the reason, where not.

A peer is another implementation of some ops, which is given the same shapes. Those that leave out part of an op's work
say so in their name: their time is a lower bound of what they would need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.cases import BLOCK_SPARSE, DROP_IN, Case
from bench.inputs import Given, make
from bench.measure.roofline import bf16_product, fp8_product, int8_product
from bench.measure.timing import Call
from bench.peers import external
from bench.peers import torch as own
from happyhorse_fast.optional import version_of


def bf16_inputs(case: Case, device: torch.device, seed: int = 0) -> Given:
    """What peers of a case are given: the inputs of its sibling in bf16."""
    return make(replace(case, precision="bf16"), device, seed)


@dataclass(eq=False)
class Peer:
    """Another implementation of some ops.

    Attributes:
        name: Under which its times are reported.
        ops: Which ops it can stand in for.
        prepare: (case, its :func:`bf16_inputs`) -> the call to time; LookupError: it has no such form of the op.
        parts: Of which of their parts; empty for all.
        precisions: And of which precisions; empty for all.
        one_expert: Whether it multiplies by one weight alone.
        package: What it is installed as; empty where that is torch.
        on_gpus: Why it runs on GPUs alone; empty where it does not.
        since: Compute capability that it needs.
        slow: Whether it compiles for seconds at its first call, so that it is timed after everything else, and on one
            set of inputs.
    """

    name: str
    ops: tuple[str, ...]
    prepare: Callable[[Case, Given], Call]
    parts: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    one_expert: bool = False
    package: str = ""
    on_gpus: str = "needs a GPU"
    since: tuple[int, ...] = ()
    slow: bool = False

    def available(self, device: torch.device) -> str | None:
        """Say why it cannot run here; None where it can."""
        if self.on_gpus and device.type != "cuda":
            return self.on_gpus
        if self.since and torch.cuda.get_device_capability(device) < self.since:
            return f"needs sm_{''.join(map(str, self.since))} or later"
        absent = bool(self.package) and version_of(self.package) is None
        return f"{self.package} is not installed" if absent else None

    def fits(self, case: Case) -> bool:
        """Tell whether it does this case's work."""
        return (
            case.op in self.ops
            and case.part in (self.parts or (case.part,))
            and case.precision in (self.precisions or (case.precision,))
            and not (self.one_expert and case.plan.experts > 1)
        )


LINEAR = ("fp8_linear_activation", "fp8_linear_residual", "qkv_linear")
LAYER = (*LINEAR, BLOCK_SPARSE, "rmsnorm_quantize")
COMPILES = "compiling takes 10 to 30 s a case on a CPU; timed on GPUs only"
"""40 cases would take longer than everything else together."""


def _dense(name: str, prepare: Callable[[Case, Given], Call], **more: Any) -> Peer:
    """Dense attention of another library, of both ways in."""
    return Peer(f"{name} (no gate)", (BLOCK_SPARSE, DROP_IN), prepare, ("dense",), **more)


def _product(name: str, maker: Callable[..., Call], **more: Any) -> Peer:
    """The bare product of torch's library."""
    return Peer(f"{name} (product only)", LINEAR, functools.partial(own.product, maker), one_expert=True, **more)


PEERS = (
    Peer("eager", (*LAYER, "select_blocks"), own.eager, on_gpus=""),
    _dense("sdpa cudnn", functools.partial(own.sdpa, "CUDNN_ATTENTION")),
    _dense("sdpa flash", functools.partial(own.sdpa, "FLASH_ATTENTION"), on_gpus=""),
    _dense("sdpa efficient", functools.partial(own.sdpa, "EFFICIENT_ATTENTION")),
    _product("torch._scaled_mm", fp8_product, precisions=("fp8", "int8"), since=(8, 9)),
    _product("torch._int_mm", int8_product, precisions=("int8",)),
    _product("torch.mm bf16", bf16_product),
    _dense("FlashAttention-4 bf16", external.flash_attention_4, package="flash-attn-4", slow=True),
    _dense("cuDNN fp8", external.cudnn_fp8, precisions=("fp8",), package="nvidia-cudnn-frontend"),
    _dense("sageattention", external.sageattention, package="sageattention"),
    Peer("flex_attention (no gate)", (BLOCK_SPARSE,), own.flex, on_gpus=COMPILES, slow=True),
    Peer("torch.compile", LAYER, own.compiled, on_gpus=COMPILES, slow=True),
)
"""In the order they are timed in, installed or not."""


def split(peers: Iterable[Peer], device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """(those that can run here, reasons of those that cannot by name)."""
    reasons = {peer: peer.available(device) for peer in peers}
    return [p for p, reason in reasons.items() if reason is None], {p.name: r for p, r in reasons.items() if r}
