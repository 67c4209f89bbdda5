"""A peer: another implementation of some ops, which is given the same shapes.

Those that leave out part of an op's work say so in their name: their time is a lower bound of what they would need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.cases import Case
from bench.inputs import Given, make
from happyhorse_fast.optional import version_of

Function = Callable[[], object]


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
    prepare: Callable[[Case, Given], Function]
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
