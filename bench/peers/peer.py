"""A peer: another implementation of some ops, which is given the same shapes.

Those that leave out part of an op's work say so in their name: their time is a lower bound of what they would need.
"""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.cases import BLOCK_SPARSE, DROP_IN, Case
from bench.inputs import Given, make

Function = Callable[[], object]
LINEAR = ("fp8_linear_activation", "fp8_linear_residual", "qkv_linear")
ATTENTION = (BLOCK_SPARSE,)
WITHOUT_GATE = (BLOCK_SPARSE, DROP_IN)
"""Attention of peers that have no gate."""
NORM = ("rmsnorm_quantize",)


@dataclass
class Inputs:
    """A case's inputs for peers: its bf16 sibling, made once on demand."""

    case: Case
    device: torch.device
    seed: int = 0

    @functools.cached_property
    def bf16(self) -> Given:
        """Inputs of the same case in bf16."""
        return make(replace(self.case, precision="bf16"), self.device, self.seed)


class Peer(ABC):
    """Another implementation of some ops.

    Attributes:
        name: Under which its times are reported.
        ops: Which ops it can stand in for.
        parts: Of which of their parts; empty for all.
        precisions: And of which precisions; empty for all.
        module: What it is imported from; empty where that is torch.
        package: What that is installed as, where its name is another.
        gpu: Whether it needs a GPU.
        slow: Whether it compiles for seconds at its first call, so that it is timed after everything else, and on one
            set of inputs.
    """

    name: str
    ops: tuple[str, ...]
    parts: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    module = ""
    package = ""
    gpu = True
    slow = False

    def available(self, device: torch.device) -> str | None:
        """Say why it cannot run here; None where it can."""
        if self.gpu and device.type != "cuda":
            return "needs a GPU"
        return missing(self.module, self.package) if self.module else None

    def fits(self, case: Case) -> bool:
        """Tell whether it does this case's work."""
        return (
            case.op in self.ops
            and case.part in (self.parts or (case.part,))
            and case.precision in (self.precisions or (case.precision,))
        )

    @abstractmethod
    def prepare(self, case: Case, inputs: Inputs) -> Function:
        """Convert the inputs, and return the call to time.

        Raises:
            LookupError: It has no such form of the op.
        """


def missing(module: str, package: str = "") -> str | None:
    """Say why a module cannot be imported; None where it is installed."""
    absent = f"{package or module} is not installed"
    try:
        return None if importlib.util.find_spec(module) else absent
    except ModuleNotFoundError:  # of a module inside a package that is not there
        return absent
    except (ImportError, ValueError) as error:
        return f"{module} cannot be looked up: {error}"
