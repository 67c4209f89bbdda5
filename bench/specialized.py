"""Attention with specialized warps (Gluon, Hopper) as an implementation of its own, ``"gluon"``.

The launch table says which of Triton's two kernels runs. Here launches are passed a configuration that says it, so that
both are checked and timed in one run, whatever is committed: ``"gluon"`` is the specialized one, ``"triton"`` plain.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.cases import STEM
from happyhorse_fast.fast.state import FastState
from happyhorse_fast.kernels.launch import SPECIALIZED_ON, LaunchConfig, config_for, launched_with, table
from happyhorse_fast.ops.runtime.dispatch import STEMS, attention_is_specialized

GLUON, FORM = "gluon", "_specialized"


def obstacle(device: torch.device) -> str | None:
    """Say why it cannot run there; None where it can."""
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
    """The backend of an implementation, whose kernel runs inside; another backend, ``"auto"`` included, is as it is."""
    if impl not in (GLUON, "triton"):
        yield impl
        return
    stem = STEMS[STEM]
    both = [name for name in table(stem) if str(SPECIALIZED_ON) in table(stem).get(f"{name}{FORM}", {})]
    passed = {
        (name, SPECIALIZED_ON): replace(config_for(stem, name, SPECIALIZED_ON), specialized=impl == GLUON)
        for name in both
    }
    with launched_with(stem, passed):
        yield "triton"
