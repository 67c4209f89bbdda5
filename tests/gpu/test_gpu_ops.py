"""Every op on the GPU: within budgets of float64, poisoned, the same bits every time, in graphs and on side streams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, DRY, MARKS, RERUNS, captured, side_stream, synchronize

from bench.cases import Case, cases, select
from bench.inputs import call, make
from bench.measure.comparison import implementations
from bench.measure.gates import problems
from bench.ops import other_backends
from happyhorse_fast.ops.runtime.self_check import run_checks

pytestmark = MARKS
SMALL = select(cases("tiny" if DRY else "small"), "25%/tiny/fp8,proj/tiny/bf16" if DRY else "")
# One per kernel: the bits of a case do not depend on what the others are.
ONE_EACH = select(
    cases("tiny"),
    "window/tiny/fp8,down/tiny/fp8" if DRY else "window,attention-dense/tiny/bf16,down,swiglu7,qkv,quantize,select",
)
if not DRY:
    # Heads of 128, which Hopper has a kernel for; those of tiny are of 64.
    ONE_EACH += select(cases("small"), "qkv_linear")
OTHERS, _ = other_backends(DEVICE)


def each(found: Iterable[Case]) -> list[Any]:
    """Every case with every backend that has a kernel for it here."""
    return [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case in found
        for backend in implementations(case, "triton", OTHERS)
    ]


@pytest.mark.skipif(DRY, reason="the self-check stage of the dry run does this")
def test_self_check_passes() -> None:
    fp8 = torch.cuda.get_device_capability() >= (8, 9)
    assert [c for c in run_checks("triton", DEVICE, fp8=fp8) if not c.passed] == []


@pytest.mark.parametrize(("case", "backend"), each(SMALL))
def test_within_budget_and_every_output_written(case: Case, backend: str) -> None:
    assert problems(case, make(case, DEVICE), backend) == []


@pytest.mark.skipif(DRY, reason="64,256 rows are hours in the interpreter")
@pytest.mark.parametrize(("case", "backend"), each(cases("main")))
def test_the_full_models_shapes(case: Case, backend: str) -> None:
    assert problems(case, make(case, DEVICE), backend) == []


@pytest.mark.parametrize(("case", "backend"), each(ONE_EACH))
def test_reruns_give_the_same_bits(case: Case, backend: str) -> None:
    assert differing(case, backend, RERUNS) == 0


@pytest.mark.skipif(DRY, reason="64,256 rows are hours in the interpreter")
@pytest.mark.parametrize(("case", "backend"), each(cases("main")))
def test_reruns_on_a_full_grid_give_the_same_bits(case: Case, backend: str) -> None:
    # A few programs race with nobody; dense attention takes 4 s.
    assert differing(case, backend, 20) == 0


def differing(case: Case, backend: str, reruns: int) -> int:
    """Elements, over all reruns, that are not what the first run gave."""
    given = make(case, DEVICE)
    start = given["hidden"].clone() if "hidden" in given else None

    def run() -> list[torch.Tensor]:
        if start is not None:
            given["hidden"].copy_(start)
        return [bits(x) for x in call(case, given, backend)]

    first = [x.clone() for x in run()]
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(reruns):
        different += sum((a != b).sum() for a, b in zip(first, run(), strict=True))
    return int(different)


@pytest.mark.parametrize(("case", "backend"), each(ONE_EACH))
def test_a_captured_graph_follows_its_inputs(case: Case, backend: str) -> None:
    if case.op == "select_blocks":
        pytest.skip("its results are indices, which other inputs need not change")
    given, other = make(case, DEVICE, 0), make(case, DEVICE, 1)
    replay, results = captured(lambda: call(case, given, backend))
    for name in ("x", "q", "hidden"):
        if name in given:
            given[name].copy_(other[name])
    copies = {"hidden": given["hidden"].clone()} if "hidden" in given else {}
    expected = [bits(x).clone() for x in call(case, given | copies, backend)]
    replay()
    synchronize()
    assert all(torch.equal(bits(a), b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(("case", "backend"), each(ONE_EACH))
def test_a_side_stream_gives_the_same_bits(case: Case, backend: str) -> None:
    given, same = make(case, DEVICE), make(case, DEVICE)
    expected = call(case, given, backend)
    with side_stream():
        results = call(case, same, backend)
    synchronize()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, expected, strict=True))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
