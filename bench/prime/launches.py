"""Every launch of a GPU run, found without one: of tables (bench/aot/cases.py), cases, clips, self-checks and tests."""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.aot import cases as aot_cases
from bench.aot.recording import Launch, record
from bench.cases import Size, cases
from bench.hopper import HOPPER, running
from bench.inputs import call, make
from bench.measure.comparison import implementations
from bench.prime.stand_in import stand_in
from bench.sampler_runs import Run, runs
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.rotary import frequency_bands
from happyhorse_fast.fast.accelerate import empty_accelerated
from happyhorse_fast.fast.attention import AttentionBound
from happyhorse_fast.fast.state import build_clip_state
from happyhorse_fast.kernels.launch import FP8_SINCE, HOPPER_ARCH
from happyhorse_fast.ops.runtime.dispatch import choose
from happyhorse_fast.ops.runtime.self_check import run_checks
from happyhorse_fast.tokens import tokens_for

SCOPES = ("tiny", "small", "main")
"""Sizes of benchmark cases that a GPU run meets."""
TESTS = ("configs", "model", "large")
"""Of tests/gpu/test_gpu_*.py; what test_gpu_ops.py launches are benchmark cases."""
BOUND = AttentionBound(50.0, 50.0)
"""Of a sampler's layers, whose weights are drawn: the norms of theirs bound scores by 60 powers of two at most."""
CPU, META = torch.device("cpu"), torch.device("meta")


def sources(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that launches on an architecture in a GPU run, by name; several may make the same launch.

    To be called where :func:`bench.prime.stand_in.stand_in` is entered.
    """
    for case in aot_cases.cases():
        if case.arch == arch and not case.pointers:  # the self-check has those, at its own shapes
            yield f"table {case.op} {case.detail}", case.launch
    also = (HOPPER,) if arch == HOPPER_ARCH else ()
    for scope in SCOPES:
        for bench_case in cases(scope):
            if bench_case.precision == "fp8" and arch < FP8_SINCE:
                continue
            for impl in implementations(bench_case, "triton", also):
                yield f"case {bench_case.name} {impl}", lambda c=bench_case, i=impl: call(c, make(c, META), i)  # type: ignore[misc]
    for run in runs():
        if run.fast is not None and run.cap_gb is None and (arch >= FP8_SINCE or "fp8" not in run.mode):
            yield f"clip {run.name}", lambda run=run: clip(run)  # type: ignore[misc]
    yield "self-check", lambda: self_checks(arch)
    for name in TESTS:
        yield f"test {name}", lambda name=name: run_tests(name)  # type: ignore[misc]


def clip(run: Run) -> None:
    """Launch what the layers of a sampler's run do, by the table's own choice of kernels."""
    config, fast = ModelConfig.preset(run.preset), run.fast
    assert fast is not None
    choices = choose("triton", fast.precision, META, attention=fast.attention_format)
    model = empty_accelerated(config, fast, choices)
    grid = Size(run.name, config, tokens_for(run.resolution, "16:9", run.seconds)).grid
    made: Any = model.fast
    state = build_clip_state(made, grid, frequency_bands(config.head_dim, CPU)).fake(META)
    hidden = torch.empty(state.rows.slots, config.hidden_size, device=META)
    layers: Any = model.block.layers
    for layer in layers:
        layer.bound = BOUND
        with torch.no_grad():
            layer(hidden, state, fast.rows_in_mlp)


def self_checks(arch: int) -> None:
    """Run the checks that `accelerate` makes before it trusts a kernel, in Hopper's kernels and in the plain ones.

    Raises:
        RuntimeError: A check fails, though the reference is compared with itself.
    """
    for impl in ("triton", HOPPER) if arch == HOPPER_ARCH else ("triton",):
        with running(impl):
            failed = [check for check in run_checks("triton", CPU, fp8=arch >= FP8_SINCE) if not check.passed]
        if failed:
            raise RuntimeError(f"self-check of {impl} with a stand-in GPU: {failed[0]}")


def run_tests(name: str) -> None:
    """Tests of a GPU, whose results here say nothing.

    Raises:
        RuntimeError: pytest could not run them.
    """
    file = str(bootstrap.ROOT / "tests" / "gpu" / f"test_gpu_{name}.py")
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", "-q", "-x", "--tb=short", "--benchmark-disable")
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main([*options, file])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"{file} ended with {code!r} on a stand-in GPU")


def found(arch: int, only: str = "") -> list[Launch]:
    """The distinct kernels that a GPU run launches, each with the name of what launches it first.

    Args:
        arch: Compute capability as 90 for 9.0.
        only: Regular expression that the name of a source must contain.
    """
    # The tests' own set-up would have kernels interpreted.
    os.environ |= {"TRITON_INTERPRET": "0", "HAPPYHORSE_FAST_GPU_TESTS": "recorded"}
    with stand_in(arch):
        return record((name, arch, launch) for name, launch in sources(arch) if re.search(only, name))
