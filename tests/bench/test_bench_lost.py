"""A CUDA error that nothing survives, and gates apart from times: what was measured stays, others are not blamed."""

from __future__ import annotations

import time

import pytest
import torch
from comparison_cases import CPU, FOREVER, Counting, compared, standing_in

from bench import ops
from bench.cases import cases, select
from bench.inputs import call
from bench.measure import comparison, gates
from bench.measure.comparison import Bench
from bench.results import Results, describe_machine, read
from happyhorse_fast.ops.runtime.obstacles import lost

TINY = cases("tiny")
pytestmark = pytest.mark.usefixtures("ceilings")


class Gpu:
    """Stands for a device that an illegal address takes from this process; what is written is read at that moment."""

    def __init__(self, monkeypatch, path):
        self.error, self.results = None, Results(path, describe_machine(CPU))
        monkeypatch.setattr(comparison, "lost", lambda device: self.error)

    def crash(self):
        self.error = "AcceleratorError: CUDA error: an illegal memory access was encountered"
        raise RuntimeError(self.error)

    @property
    def written(self):
        return {entry["case"]: entry["verified"] for entry in read(self.results.path)["entries"]}


def test_a_lost_gpu_stops_the_run_at_the_case_that_lost_it(bench, monkeypatch, tmp_path, capsys):
    gpu = Gpu(monkeypatch, tmp_path / "r.json")
    first, second, third = select(TINY, "quantize/tiny/fp8,swiglu7/tiny/bf16,qkv_linear/tiny/bf16")
    monkeypatch.setattr(gates, "call", lambda case, *rest: gpu.crash() if case == second else call(case, *rest))
    bench.results = gpu.results
    ops.run(bench, [first, second, third], time.monotonic() + 60)
    assert gpu.written == {first.name: True, second.name: False}, "the third is not blamed"
    assert "STOPPED" in capsys.readouterr().err


def test_a_peer_that_takes_the_gpu_is_left_out_when_the_run_starts_again(monkeypatch, tmp_path):
    gpu, case = Gpu(monkeypatch, tmp_path / "r.json"), select(TINY, "quantize/tiny/bf16")[0]

    def run(keep):
        peers = [standing_in("crashing", lambda case, inputs: gpu.crash()), Counting("counting")]
        return ops.run(Bench(CPU, "reference", 0.0, peers, results=gpu.results, keep=keep), [case], FOREVER)

    assert run("none") == []
    assert gpu.results.data["gates"] == [{"case": case.name, "impl": "reference", "passed": True}]
    gpu.error = None
    monkeypatch.setattr(Bench, "gate", lambda *_: pytest.fail("gated already"))
    (entry,) = run("all")
    assert entry["verified"] and set(entry["peers"]) == {"counting"}
    monkeypatch.setattr(Bench, "compare", lambda *_: pytest.fail("timed already"))
    assert run("all") == [entry]


def test_a_gpu_lost_in_turns_is_held_against_the_peers_then_against_ours(monkeypatch, tmp_path):
    gpu, case = Gpu(monkeypatch, tmp_path / "r.json"), select(TINY, "quantize/tiny/bf16")[0]

    def run():
        gpu.error = None
        bench = Bench(CPU, "reference", 0.0, [Counting("counting")], results=gpu.results, keep="all")
        monkeypatch.setattr(bench.stopwatch, "interleave", lambda *_, **__: gpu.crash())
        return ops.run(bench, [case], FOREVER)

    assert run() == [] and f"counting on {case.name}" in gpu.results.data["absent"]
    (entry,) = run()
    assert not entry["verified"] and "illegal memory access" in entry["reason"]
    assert run() == [entry], "not tried a third time"


def test_gates_alone_time_nothing_and_are_not_made_again(monkeypatch, tmp_path):
    results = Results(tmp_path / "r.json", describe_machine(CPU))
    good, bad = select(TINY, "quantize/tiny/bf16")[0], select(TINY, "proj/tiny/bf16")[0]
    gate = Bench.gate
    monkeypatch.setattr(Bench, "gate", lambda self, case, impl: ["wrong"] if case == bad else gate(self, case, impl))
    (red,) = ops.run(Bench(CPU, "reference", 0.0, results=results), [good, bad], FOREVER, gates=True)
    assert results.data["entries"] == [red] and red["case"] == bad.name, "the red one alone has an entry"
    monkeypatch.setattr(Bench, "gate", lambda *_: pytest.fail("gated already"))
    (entry,) = ops.run(Bench(CPU, "reference", 0.0, results=results, keep="gates"), [good, bad], FOREVER)
    assert entry["case"] == good.name and entry["verified"]
    assert {entry["case"]: entry["verified"] for entry in results.data["entries"]} == {good.name: True, bad.name: False}


def test_what_another_process_should_have_gated_is_left_out_where_it_was_cut(monkeypatch):
    case = select(TINY, "quantize/tiny/bf16")[0]
    monkeypatch.setattr(gates, "call", lambda case, given, backend: call(case, given, "reference"))
    monkeypatch.setattr(comparison, "call", lambda case, given, backend: call(case, given, "reference"))
    known = [{"case": case.name, "impl": "cuda", "passed": True}]
    for gated, keep, timed in (
        (known, "gates", {"triton", "cuda"}),
        ([], "gates", {"triton"}),
        ([], "all", {"triton"}),
    ):
        results = Results(None, {})
        results.data["gates"] = gated
        entries = compared(Bench(CPU, "triton", 0.0, also=["cuda"], results=results, keep=keep), [case])
        assert {entry["impl"] for entry in entries} == timed
    assert {e["impl"] for e in compared(Bench(CPU, "triton", 0.0, also=["cuda"]), [case])} == {"triton", "cuda"}


def test_a_number_stays_where_its_gate_is_made_again(tmp_path):
    results = Results(tmp_path / "r.json", describe_machine(CPU))
    case = select(TINY, "quantize/tiny/bf16")[0]
    (entry,) = ops.run(Bench(CPU, "reference", 0.0, results=results), [case], FOREVER)
    assert ops.run(Bench(CPU, "reference", 0.0, results=results), [case], FOREVER, gates=True) == []
    assert results.data["entries"] == [entry]


def test_what_a_lost_gpu_says(monkeypatch):
    def poisoned(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "synchronize", poisoned)
    assert lost(torch.device("cuda")) == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert lost(CPU) is None
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert lost(torch.device("cuda")) is None
