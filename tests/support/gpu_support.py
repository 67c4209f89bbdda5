"""Where the GPU tests run: on CUDA; on the CPU through the interpreter, as a dry run of their bodies; or on the CPU to
find out what they launch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bench.bootstrap as bootstrap

MODE = os.environ.get("HAPPYHORSE_FAST_GPU_TESTS", "")
DRY = MODE == "dry"
"""Set by ``make gpu DRY=1``: tiny shapes, few of them, in the interpreter, so that no test's body is untried."""
RECORDED = MODE == "recorded"
"""Set by ``make prime``: ops launch nothing, are recorded, and give the reference's results (``prime.stand_in``)."""
DEVICE = torch.device("cpu" if DRY or RECORDED else "cuda")
RERUNS = 2 if DRY else 1000


def obstacle() -> str | None:
    """Why GPU tests cannot run here; None where they can."""
    if RECORDED:
        return None
    if DRY:
        return None if bootstrap.INTERPRETED else "a dry run needs TRITON_INTERPRET=1"
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if bootstrap.INTERPRETED:
        return "kernels are interpreted (TRITON_INTERPRET=1); `make gpu STAGES=tests` compiles them"
    return None


MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
    # The sigmoid of a large negative number, in the interpreter.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(replay, static results) of a call captured in a CUDA graph after a warm-up; on the CPU just the call again."""
    if DEVICE.type != "cuda":
        results = list(call())

        def again() -> None:
            for old, new in zip(results, call(), strict=True):
                old.copy_(new)

        return again, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def side_stream() -> contextlib.AbstractContextManager[Any]:
    """A stream other than the current one, that has waited for it."""
    if DEVICE.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)
