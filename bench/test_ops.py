"""The ops as pytest-benchmark cases: `make bench`; `BENCH_SCOPE=main make bench` on a GPU, or tiny, small, full."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch

from bench import ops
from bench.cases import Case, cases
from bench.conftest import BENCH, ENTRIES
from bench.inputs import call, make
from bench.peers import all_peers, split
from bench.timing import Timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCOPE = os.environ.get("BENCH_SCOPE") or ("main" if DEVICE.type == "cuda" else "small")
ROUNDS = 5 if DEVICE.type == "cpu" else 20


def device_seconds() -> float:
    """The CPU's clock after the device has finished: what pytest-benchmark times with."""
    import time

    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> ops.Bench:
    """Peaks and peers of this machine, found once."""
    peers, absent = split(all_peers(), DEVICE)
    made = ops.Bench(DEVICE, ops.default_backend(DEVICE), seconds=0.2, peers=peers, absent=absent)
    pytestconfig.stash[BENCH] = made
    pytestconfig.stash[ENTRIES] = []
    return made


@pytest.mark.benchmark(timer=device_seconds)
@pytest.mark.parametrize("case", cases(SCOPE), ids=lambda case: case.name)
def test_op(case: Case, benchmark: Any, bench: ops.Bench, pytestconfig: pytest.Config) -> None:
    """Gate, then time; a red gate fails and leaves no number."""
    entries = pytestconfig.stash[ENTRIES]
    problems = bench.gate(case)
    if problems:
        entries.append(ops.red(case, bench.backend, problems))
        pytest.fail(problems[0])
    rotating = itertools.cycle([make(case, DEVICE, seed) for seed in range(ops.SETS)])

    def fresh() -> tuple[tuple[Any], dict[str, Any]]:
        bench.stopwatch.flush()
        return (next(rotating),), {}

    benchmark.pedantic(lambda given: call(case, given, bench.backend), setup=fresh, rounds=ROUNDS, warmup_rounds=1)
    times = sorted(1e3 * t for t in benchmark.stats.stats.data)
    timing = Timing(1e3 * benchmark.stats.stats.median, times[0], times[-1], len(times), "pytest-benchmark")
    entry = ops.timed(case, bench.backend, timing, bench.peaks)
    for slow in (False, True):
        bench.add_peers(entry, case, slow=slow)
    benchmark.extra_info.update(entry)
    entries.append(entry)
