"""Attention's kernel for Hopper as an implementation of its own, ``"hopper"``.

The launch table says which of Triton's two kernels runs. Here launches are passed a configuration that says it, so that
both are checked and timed in one run, whatever is committed: ``"hopper"`` is the Hopper kernel, ``"triton"`` plain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.cases import BLOCK_SPARSE
from happyhorse_fast.fast.state import FastState
from happyhorse_fast.kernels.launch import HOPPER_ARCH, config_for, launched_with, table
from happyhorse_fast.ops.runtime.dispatch import STEMS, attention_is_hopper, compute_capability

HOPPER, FORM = "hopper", "_hopper"


def obstacle(device: torch.device) -> str | None:
    """Say why it cannot run there; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs a GPU"
    arch = compute_capability(device)
    return None if arch == HOPPER_ARCH else f"needs warp-group products, sm_{HOPPER_ARCH}; this is sm_{arch}"


def attention_kernel(state: FastState, device: torch.device) -> str:
    """The kernel that an accelerated model's attention runs in: ``"hopper"``, or its backend."""
    backend = state.choices[BLOCK_SPARSE].backend
    if backend == "triton" and attention_is_hopper(state.fast.attention_format, state.config.head_dim, device):
        return HOPPER
    return backend


@contextlib.contextmanager
def running(impl: str) -> Iterator[str]:
    """The backend of an implementation, whose kernel runs inside; another backend, ``"auto"`` included, is as it is."""
    if impl not in (HOPPER, "triton"):
        yield impl
        return
    stem = STEMS[BLOCK_SPARSE]
    both = [name for name in table(stem) if str(HOPPER_ARCH) in table(stem).get(f"{name}{FORM}", {})]
    passed = {(name, HOPPER_ARCH): replace(config_for(stem, name, HOPPER_ARCH), hopper=impl == HOPPER) for name in both}
    with launched_with(stem, passed):
        yield "triton"
