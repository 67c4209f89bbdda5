"""Attention with specialized warps (Gluon, Hopper) as an implementation of its own, ``"gluon"``.

The launch table says which of Triton's two kernels runs. Here it is told to take one of them for a while, so that both
are checked and timed in one run, whatever is committed: ``"gluon"`` is the specialized one, ``"triton"`` the plain one.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch

from bench.cases import STEM
from happyhorse_fast.kernels.launch import SPECIALIZED_ON, LaunchConfig, table
from happyhorse_fast.model.fast_state import FastState
from happyhorse_fast.ops.dispatch import attention_is_specialized

GLUON, FORM = "gluon", "_specialized"


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run there; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs a GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor != SPECIALIZED_ON:
        return f"needs warp-group products, sm_{SPECIALIZED_ON}; this is sm_{major}{minor}"
    return None if importlib.util.find_spec("triton.experimental.gluon") else "Triton has no Gluon"


def impl_of(config: LaunchConfig) -> str:
    """The implementation that a configuration of attention is of."""
    return GLUON if config.specialized else "triton"


def attention_kernel(state: FastState, device: torch.device) -> str:
    """The kernel that an accelerated model's attention runs in: ``"gluon"``, or its backend."""
    backend = state.choices[STEM].backend
    if backend == "triton" and attention_is_specialized(state.fast.attention_format, state.config.head_dim, device):
        return GLUON
    return backend


@contextlib.contextmanager
def running(impl: str) -> Iterator[str]:
    """The backend of an implementation, with the launch table that it needs while inside; ``"auto"`` takes it as is."""
    if impl not in (GLUON, "triton"):
        yield impl
        return
    entries = [
        entry
        for variant, archs in table(STEM).items()
        for arch, entry in archs.items()
        if arch in table(STEM).get(f"{variant}{FORM}", {})
    ]
    before = [entry.get("specialized") for entry in entries]
    try:
        for entry in entries:
            entry["specialized"] = impl == GLUON
        yield "triton"
    finally:
        for entry, value in zip(entries, before, strict=True):
            if value is None:
                del entry["specialized"]
            else:
                entry["specialized"] = value
