"""Set-up of every test run: the Triton interpreter, made exact, before any kernel is defined."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

# `bench` is not installed. Last on the path: an installed library `kernels` must be found before the folder kernels/.
sys.path.append(str(Path(__file__).parents[1]))

# Kernels read this when they are defined; ahead-of-time compiles run in subprocesses without it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from cuda_shim import SHIM
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from happyhorse_fast.ops.runtime.cuda.launch import use_runner

# Two workers share two cores.
torch.set_num_threads(1)

# The same examples in every run, and none is too slow on a busy machine. `fuzz.examples` goes by max_examples.
ALWAYS = {"database": None, "deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, max_examples=100, **ALWAYS)
settings.register_profile("fuzz", derandomize=False, max_examples=2000, **ALWAYS)
settings.load_profile("repeatable")
# Hypothesis also draws constants of the modules that are imported by then, which depends on the tests before.
NO_CONSTANTS = providers.Constants()
mock.patch.object(providers, "_get_local_constants", lambda *, constants=NO_CONSTANTS: constants).start()


def seed() -> None:
    """All generators that nobody made: of code under test and of its libraries too."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def pytest_collectstart() -> None:
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is marked ``quick(n)``, n of its cases, spread evenly, are quick; the rest are slow proofs."""
    cases: dict[tuple[object, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("quick") and not item.get_closest_marker("slow"):
            cases.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for found in cases.values():
        (quick,) = found[0].get_closest_marker("quick").args  # type: ignore[union-attr]
        kept = {i * len(found) // quick for i in range(quick)}
        for i, item in enumerate(found):
            if i not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before any fixture, so that no test draws what the tests before it left."""
    seed()


def pytest_collection_finish() -> None:
    """What is imported by now stays: searching it for garbage again and again took a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def cuda_runner() -> Iterator[None]:
    """CUDA kernels of tensors on the CPU run in the shim of csrc/; it is built at the first launch."""
    with use_runner(SHIM):
        yield


@pytest.fixture
def sigint_raises() -> Iterator[None]:
    """A shell's background job starts with SIGINT ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
