"""The stopwatch: no launch gap in a (simulated) GPU's times, a cold cache, rotated inputs, turns on a warm chip."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from simulated_gpu import FLUSH_MS, Gpu, install

from bench.bootstrap import ROOT
from bench.cases import FULL_SIZES, cases_of
from bench.measure import roofline, timing
from bench.measure.conditions import Monitor
from bench.measure.timing import FEWEST, MOST, PILOT, Failed, Prepared, Stopwatch, Timing

CPU = torch.device("cpu")


def alone(watch: Stopwatch, calls, *, seconds: float) -> Timing:
    """Times of one contestant, as it finds the chip."""
    prepared = watch.prepare(calls, dry=not seconds)
    return watch.interleave({"": prepared}, seconds=seconds, warm=0.0).timings[""]


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch, Gpu())


def test_a_launch_that_takes_the_host_long_is_not_in_the_time(gpu):
    taken = alone(gpu.stopwatch(), [lambda: gpu.launch("call", 0.4, 3.0)], seconds=0.1)
    assert taken.clock == "events"
    assert taken.times_ms == pytest.approx([3.0] * len(taken.times_ms))


def test_waiting_after_every_call_would_put_it_there(gpu, monkeypatch):
    # What the queue is for: one call at a time shows 0.34 ms of the host's.
    monkeypatch.setattr(timing, "HEAD_START", 0)
    alone = Prepared([lambda: gpu.launch("call", 0.4, 3.0)], "events", 3.0)
    assert gpu.stopwatch()._rounds({"": alone}, range(1))[""] == pytest.approx([3.34])


def test_a_call_shorter_than_its_launch_is_captured(gpu, monkeypatch):
    # 0.4 ms of host time for 0.05 ms on the device: no queue hides that.
    call = [lambda: gpu.launch("call", 0.4, 0.05)]
    assert alone(gpu.stopwatch(), call, seconds=0.1).median_ms > 0.3
    monkeypatch.setattr(timing, "_captured", lambda calls: [lambda: gpu.launch("replay", 0.01, 0.05)])
    taken = alone(gpu.stopwatch(), call, seconds=0.1)
    assert taken.clock == "graph" and taken.median_ms == pytest.approx(0.05)


def test_every_call_finds_the_cache_cold_and_other_inputs(gpu):
    calls = [lambda name=name: gpu.launch(name, 0.01, 3.0) for name in "ab"]
    alone(gpu.stopwatch(), calls, seconds=0.1)
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
    assert len(alone(gpu.stopwatch(), long, seconds=0.3).times_ms) == FEWEST
    assert gpu.done.count("call") == 1 + PILOT + FEWEST
    short = [lambda: gpu.launch("call", 0.01, 2.5)]
    assert len(alone(gpu.stopwatch(), short, seconds=0.1).times_ms) == pytest.approx(38, abs=2)
    assert len(alone(gpu.stopwatch(), short, seconds=60).times_ms) == MOST


# A power limit --------------------------------------------------------------------------------------------------------

WORK_MS = 6.0


def kernels(gpu: Gpu) -> dict[str, Prepared]:
    """Two of the same work."""
    calls = {name: (lambda name=name: gpu.launch(name, 0.01, WORK_MS)) for name in "ab"}
    return {name: Prepared([call], "events", WORK_MS) for name, call in calls.items()}


def test_kernels_timed_one_after_another_differ_by_what_the_chip_warmed(monkeypatch):
    gpu = install(monkeypatch, Gpu(slower=0.2))
    watch = gpu.stopwatch()
    alone = {name: watch.interleave({name: p}, seconds=0.05, warm=0.0) for name, p in kernels(gpu).items()}
    first, second = (span.timings[name].median_ms for name, span in alone.items())
    assert 1.05 < second / first <= 1.2
    assert alone["a"].name != alone["b"].name, "of two spans, so not comparable"


@pytest.mark.parametrize("cool_ms", [0.0, 60_000.0])
def test_kernels_that_take_turns_on_a_warm_chip_agree(cool_ms, monkeypatch):
    gpu = install(monkeypatch, Gpu(slower=0.2))
    gpu.idle(cool_ms)
    span = gpu.stopwatch().interleave(kernels(gpu))
    a, b = (span.timings[name] for name in "ab")
    assert a.median_ms / b.median_ms == pytest.approx(1, abs=0.01)
    # Warm from the first timed round on, and for a second at least.
    assert a.median_ms == pytest.approx(1.2 * WORK_MS, rel=0.01) == a.times_ms[0]
    assert sum(a.times_ms) + sum(b.times_ms) > 950
    assert [what for what in gpu.done if what != "flush"][:4] == ["a", "b", "a", "b"]


def test_without_the_untimed_rounds_the_first_ones_are_of_a_cool_chip(monkeypatch):
    gpu = install(monkeypatch, Gpu(slower=0.2))
    assert gpu.stopwatch().interleave(kernels(gpu), warm=0.0).timings["a"].times_ms[0] < 1.02 * WORK_MS


def test_turns_keep_the_cache_cold_and_the_device_busy(monkeypatch):
    gpu = install(monkeypatch, Gpu())
    span = gpu.stopwatch().interleave(kernels(gpu), seconds=0.1, warm=0.05)
    rounds = len(span.timings["a"].times_ms)
    assert rounds == 9 and gpu.done.count("a") == 9 + 5, "rounds of 12.2 ms each"
    assert all({x, y} & {"flush"} for x, y in itertools.pairwise(gpu.done))
    assert gpu.device == pytest.approx(14 * 2 * (WORK_MS + FLUSH_MS), abs=2.0)


def test_who_raises_while_turns_are_taken_is_named(gpu):
    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    some = kernels(gpu) | {"peer": Prepared([full], "events", 1.0)}
    with pytest.raises(Failed, match="OutOfMemoryError: CUDA out of memory") as caught:
        gpu.stopwatch().interleave(some)
    assert caught.value.contestant == "peer"


def test_a_stopwatch_tells_a_slow_call_from_a_fast_one():
    watch = Stopwatch(CPU)
    fast = alone(watch, [lambda: time.sleep(0.001)], seconds=0.01)
    slow = alone(watch, [lambda: time.sleep(0.02)], seconds=0.1)
    assert fast.median_ms < 20 <= slow.median_ms
    assert slow.low_ms <= slow.median_ms <= slow.high_ms
    assert len(slow.times_ms) >= FEWEST
    with pytest.raises(ValueError, match="at least one call"):
        alone(watch, [], seconds=0.1)


def test_spread_is_between_tenths():
    spread = Timing(tuple(float(i) for i in (9, 1, 2, 3, 4, 5, 6, 7, 8, 0, 100)), "cpu")
    assert (spread.low_ms, spread.median_ms, spread.high_ms) == (1.0, 5.0, 9.0)


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

    chosen = ["bench/test_ops.py", "-k", "rmsnorm_quantize", "-p", "no:xdist", "-q", "-s"]
    saved = ["--benchmark-autosave", f"--benchmark-storage={storage}"]
    shown = run("import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", *chosen, *saved)
    assert "eager" in shown and "of the measured ceiling" in shown and "absent: sageattention" in shown
    (first,) = tmp_path.glob("*/0001_*.json")
    for one in json.loads(first.read_text())["benchmarks"]:
        assert 1e3 * one["stats"]["median"] == pytest.approx(one["extra_info"]["median_ms"]), "what was measured"
    shutil.copy(first, first.with_name("0002_again.json"))
    compare = ["pytest-benchmark", "--storage", storage, "compare", "0001", "0002", "--columns=median"]
    compared = run(f"import sys; from pytest_benchmark.cli import main; sys.argv[:] = {compare!r}; main()")
    for precision in ("bf16", "fp8"):
        assert compared.count(f"test_op[rmsnorm_quantize/tiny/{precision}]") == 2, compared


def test_measured_ceilings_are_of_a_warm_chip(monkeypatch):
    # A product on a cool chip would be a ceiling that nothing reaches a minute later; the copy warms nothing here.
    gpu = install(monkeypatch, Gpu(slower=0.2, warms_ms=300.0))
    watch = gpu.stopwatch()
    monkeypatch.setattr(roofline, "COPY_BYTES", 4 << 10)
    monkeypatch.setattr(roofline, "large_copy", lambda size, device: lambda: gpu.idle(2.0))
    for name, ms in (("bf16_product", 8.0), ("fp8_product", 4.0), ("int8_product", 5.0)):
        monkeypatch.setattr(roofline, name, lambda *_, ms=ms: lambda: gpu.launch("product", 0.01, ms))

    class Sampled(Monitor):
        def during(self, began, ended):
            return {"sm_mhz": 1395.0, "power_w": 699.0}

    peaks = roofline.measured(watch, seconds=0.1, monitor=Sampled(CPU))
    case = next(case for case in cases_of(FULL_SIZES[0]) if case.op == "qkv_linear")
    _, features, inputs = case.weight_shape("up")
    cool = 2.0 * case.rows * features * inputs / 8.0 / 1e9
    assert peaks.bf16 == pytest.approx(cool / 1.2, rel=0.01) and peaks.fp8 == pytest.approx(2 * peaks.bf16, rel=0.01)
    assert peaks.int8 == pytest.approx(1.6 * peaks.bf16, rel=0.01)
    assert (peaks.sm_mhz, peaks.power_w, peaks.source) == (1395.0, 699.0, roofline.MEASURED)
