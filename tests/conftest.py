"""Set-up of every test run: the Triton interpreter, made exact, before any kernel is defined."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# `bench` is not installed. Last on the path: an installed library `kernels` must be found before the folder kernels/.
sys.path.append(str(Path(__file__).parents[1]))

# Kernels read this when they are defined; ahead-of-time compiles run in subprocesses without it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from cuda_shim import SHIM

from happyhorse_fast.ops.cuda.launch import use_runner

# Two workers share two cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cuda_runner():
    """CUDA kernels of tensors on the CPU run in the shim of csrc/; it is built at the first launch."""
    with use_runner(SHIM):
        yield
