"""The stopwatch: no launch gap in a (simulated) GPU's times, a cold cache, rotated inputs; what is kept of them."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench import timing
from bench.bootstrap import ROOT
from bench.timing import FEWEST, MOST, Recorded, Stopwatch, Timing

CPU = torch.device("cpu")


@dataclass
class Gpu:
    """A device and a host with a queue between them, in milliseconds."""

    host: float = 0.0
    device: float = 0.0
    done: list[str] = field(default_factory=list)

    def launch(self, what: str, on_host: float, on_device: float) -> None:
        self.host += on_host
        self.device = max(self.device, self.host) + on_device
        self.done.append(what)

    def events(self) -> Any:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.device, gpu.host)

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        return Event


@pytest.fixture
def gpu(monkeypatch):
    simulated = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", simulated.events())
    monkeypatch.setattr(timing, "_captured", lambda calls: None)
    return simulated


def stopwatch(gpu: Gpu) -> Stopwatch:
    watch = Stopwatch(CPU)
    watch.device = torch.device("cuda")
    watch.flush = lambda: gpu.launch("flush", 0.01, 0.06)  # type: ignore[method-assign]
    return watch


def test_a_launch_that_takes_the_host_long_is_not_in_the_time(gpu):
    taken = stopwatch(gpu).time([lambda: gpu.launch("call", 0.4, 3.0)], seconds=0.1)
    assert taken.clock == "events"
    assert taken.times_ms == pytest.approx([3.0] * len(taken.times_ms))


def test_waiting_after_every_call_would_put_it_there(gpu, monkeypatch):
    # What the queue is for: one call at a time shows 0.34 ms of the host's.
    monkeypatch.setattr(timing, "HEAD_START", 0)
    (alone,) = stopwatch(gpu)._device_ms([lambda: gpu.launch("call", 0.4, 3.0)], 1)
    assert alone == pytest.approx(3.34)


def test_a_call_shorter_than_its_launch_is_captured(gpu, monkeypatch):
    # 0.4 ms of host time for 0.05 ms on the device: no queue hides that.
    call = [lambda: gpu.launch("call", 0.4, 0.05)]
    assert stopwatch(gpu).time(call, seconds=0.1).median_ms > 0.3
    monkeypatch.setattr(timing, "_captured", lambda calls: [lambda: gpu.launch("replay", 0.01, 0.05)])
    taken = stopwatch(gpu).time(call, seconds=0.1)
    assert taken.clock == "graph" and taken.median_ms == pytest.approx(0.05)
    assert stopwatch(gpu).time(call, seconds=0.1, graph=False).clock == "events"


def test_every_call_finds_the_cache_cold_and_other_inputs(gpu):
    calls = [lambda name=name: gpu.launch(name, 0.01, 3.0) for name in "ab"]
    stopwatch(gpu).time(calls, seconds=0.1)
    counted = gpu.done[gpu.done.index("flush") :]
    for before, what in itertools.pairwise(counted):
        assert "flush" in (before, what), "two calls without a flush between them"
    named = [what for what in counted if what != "flush"]
    assert all(x != y for x, y in itertools.pairwise(named[:FEWEST]))


def test_the_flush_is_larger_than_any_cache(monkeypatch):
    sizes = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"L2_cache_size": 200 << 20}))
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: sizes.append(n * dtype.itemsize))
    Stopwatch(torch.device("cuda"))
    assert sizes == [400 << 20]
    assert timing.FLUSH_BYTES >= 4 * (50 << 20), "an H100's is 50 MB"


def test_the_flush_leaves_nothing_to_be_written_back():
    # A cache full of written lines would write them to memory during the next call.
    watch = Stopwatch(CPU)
    version, size = watch._flush._version, watch._flush.nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        watch.flush()
    assert "aten::sum" in {event.key for event in profile.key_averages()}
    assert watch._flush._version == version and size == timing.CPU_FLUSH_BYTES, "read, whole, and not written"


def test_calls_are_repeated_for_about_the_time_that_was_asked_for(gpu):
    long = [lambda: gpu.launch("call", 0.1, 500.0)]
    assert len(stopwatch(gpu).time(long, seconds=0.3).times_ms) == FEWEST
    assert gpu.done.count("call") == 1 + FEWEST, "what was measured to choose is not measured again"
    short = [lambda: gpu.launch("call", 0.01, 2.5)]
    assert len(stopwatch(gpu).time(short, seconds=0.1).times_ms) == pytest.approx(38, abs=2)
    assert len(stopwatch(gpu).time(short, seconds=60).times_ms) == MOST


def test_a_stopwatch_tells_a_slow_call_from_a_fast_one():
    watch = Stopwatch(CPU)
    fast = watch.time([lambda: None], seconds=0.01)
    slow = watch.time([lambda: time.sleep(0.02)], seconds=0.1)
    assert fast.median_ms < 20 <= slow.median_ms
    assert slow.low_ms <= slow.median_ms <= slow.high_ms
    assert len(slow.times_ms) >= FEWEST
    with pytest.raises(ValueError, match="at least one call"):
        watch.time([])


def test_spread_is_between_tenths():
    spread = Timing(tuple(float(i) for i in (9, 1, 2, 3, 4, 5, 6, 7, 8, 0, 100)), "cpu")
    assert (spread.low_ms, spread.median_ms, spread.high_ms) == (1.0, 5.0, 9.0)


def test_what_was_measured_is_played_back():
    recorded = Recorded()
    recorded.load(Timing((3.0, 5.0), "graph"))
    read = [recorded.seconds()]
    for _ in range(2):
        recorded.call()
        read.append(recorded.seconds())
    assert read == pytest.approx([0.0, 0.003, 0.008])
    with pytest.raises(StopIteration):
        recorded.call()


@pytest.mark.slow  # 9 s: all that `make bench` imports
def test_pytest_benchmark_compares_the_files_of_runs(tmp_path):
    # Without what says that this is a worker of a run in parallel, in which pytest-benchmark saves nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"BENCH_SCOPE": "tiny", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    storage = f"file://{tmp_path}"

    def run(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    chosen = ["bench/test_ops.py", "-k", "rmsnorm_quantize", "-p", "no:xdist", "-q"]
    saved = ["--benchmark-autosave", f"--benchmark-storage={storage}"]
    shown = run("import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", *chosen, *saved)
    assert "eager" in shown and "roofline" in shown and "absent: sageattention" in shown
    (first,) = tmp_path.glob("*/0001_*.json")
    shutil.copy(first, first.with_name("0002_again.json"))
    compare = ["pytest-benchmark", "--storage", storage, "compare", "0001", "0002", "--columns=median"]
    compared = run(f"import sys; from pytest_benchmark.cli import main; sys.argv[:] = {compare!r}; main()")
    for precision in ("bf16", "fp8"):
        assert compared.count(f"test_op[rmsnorm_quantize/tiny/{precision}]") == 2, compared
