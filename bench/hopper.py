"""Triton's kernels for Hopper as an implementation of their own, ``"hopper"``: of attention, and of most products.

The launch tables say which of Triton's two kernels runs. Here launches are passed a configuration that says it, so that
both are checked and timed in one run, whatever is committed: ``"hopper"`` is the Hopper kernel, ``"triton"`` plain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.cases import BLOCK_SPARSE, DROP_IN, Case
from happyhorse_fast.fast.state import FastState
from happyhorse_fast.kernels.launch import HOPPER_ARCH, HOPPER_HEAD_DIM, config_for, launched_with, table
from happyhorse_fast.ops.linear.contract import ACTIVATIONS
from happyhorse_fast.ops.quantize import FORMATS
from happyhorse_fast.ops.runtime.checks import compute_capability
from happyhorse_fast.ops.runtime.dispatch import STEMS, is_hopper

HOPPER, FORM = "hopper", "_hopper"
_ATTENTION = table(STEMS[BLOCK_SPARSE])
ENTRIES = {
    STEMS[BLOCK_SPARSE]: tuple(name for name in _ATTENTION if f"{name}{FORM}" in _ATTENTION),
    "linear": tuple(f"{fmt}_{name}" for fmt in FORMATS.values() for name in ("residual", *ACTIVATIONS)),
    "qkv": tuple(f"qkv_{fmt}" for fmt in FORMATS.values()),
}
"""Launch table -> its entries of which there is such a kernel."""


def obstacle(device: torch.device) -> str | None:
    """Say why it cannot run there; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs a GPU"
    arch = compute_capability(device)
    return None if arch == HOPPER_ARCH else f"needs warp-group products, sm_{HOPPER_ARCH}; this is sm_{arch}"


def fits(case: Case) -> bool:
    """Whether there is such a kernel for a case; of QKV for heads of 128 alone."""
    if case.op == "qkv_linear":
        return case.plan.head_dim == HOPPER_HEAD_DIM
    return case.op in (BLOCK_SPARSE, DROP_IN, "fp8_linear_residual", "fp8_linear_activation")


def attention_kernel(state: FastState, device: torch.device) -> str:
    """The kernel that an accelerated model's attention runs in: ``"hopper"``, or its backend."""
    backend = state.choices[BLOCK_SPARSE].backend
    if backend == "triton" and is_hopper(
        BLOCK_SPARSE, state.fast.attention_format, device, head_dim=state.config.head_dim
    ):
        return HOPPER
    return backend


@contextlib.contextmanager
def running(impl: str) -> Iterator[str]:
    """The backend of an implementation, whose kernels run inside; another backend, ``"auto"`` included, is as it is."""
    if impl not in (HOPPER, "triton"):
        yield impl
        return
    with contextlib.ExitStack() as stack:
        for stem, names in ENTRIES.items():
            configs = {
                (n, HOPPER_ARCH): replace(config_for(stem, n, HOPPER_ARCH), hopper=impl == HOPPER) for n in names
            }
            stack.enter_context(launched_with(stem, configs))
        yield "triton"
