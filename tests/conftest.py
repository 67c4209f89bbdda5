"""Set-up of every test run: the Triton interpreter, made exact, before any kernel is defined."""

from __future__ import annotations

import os

# Kernels read this when they are defined; ahead-of-time compiles run in subprocesses without it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

# Two workers share two cores.
torch.set_num_threads(1)
