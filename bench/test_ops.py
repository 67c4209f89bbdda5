"""The ops as pytest-benchmark cases: `make bench`; BENCH_SCOPE names others, see `bench.cases.cases`.

Before their table comes that of `python -m bench.ops`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import ops
from bench.cases import Case, cases
from bench.measure import comparison
from bench.measure.conditions import Monitor
from bench.peers.registry import PEERS, split

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCOPE = os.environ.get("BENCH_SCOPE") or ("main" if DEVICE.type == "cuda" else "small")
BACKEND = ops.default_backend(DEVICE)
OTHERS, WITHOUT = ops.other_backends(DEVICE)
NOW = [0.0]
"""Seconds of the recorded calls so far: the host's clock around one on a GPU would hold its launch, no device time."""


def benchmarks() -> list[Any]:
    """Every case with every implementation that has a kernel for it."""
    return [
        pytest.param(case, impl, id=case.name if impl == BACKEND else f"{case.name}/{impl}")
        for case in cases(SCOPE)
        for impl in comparison.implementations(case, BACKEND, OTHERS)
    ]


@pytest.fixture(scope="session")
def bench() -> Iterator[comparison.Bench]:
    """Peers of this machine, found once; the table at the end."""
    peers, absent = split(PEERS, DEVICE)
    made = comparison.Bench(DEVICE, BACKEND, seconds=0.2, peers=peers, results=ops.open_results(None, DEVICE))
    made.results.add_absent(absent | WITHOUT)
    with Monitor(DEVICE) as made.monitor:
        yield made
    print(f"\n{ops.summary(made)}")


@pytest.mark.benchmark(timer=lambda: NOW[0])
@pytest.mark.parametrize(("case", "impl"), benchmarks())
def test_op(case: Case, impl: str, benchmark: Any, bench: comparison.Bench) -> None:
    """Gate, then time; a red gate fails and leaves no number."""
    bench.backend = impl
    timing, entry = bench.compare((case,), bench.peers).get((case, impl)), bench.found.get((case.name, impl), {})
    if timing is None:
        pytest.fail(entry.get("reason", "none of the peers that compile did"))
    recorded = iter(timing.times_ms)

    def played() -> None:
        NOW[0] += next(recorded) / 1e3

    benchmark.pedantic(played, rounds=len(timing.times_ms))
    benchmark.extra_info.update(entry)
