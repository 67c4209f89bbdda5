"""The sampler benchmark: every mode, mask and cap, what is cut or fails, memory capped to a smaller card's."""

from __future__ import annotations

import interpreter  # noqa: F401  (exact arithmetic)
import pytest
import torch

from bench import sampler
from bench.results import Results, read

CPU = torch.device("cpu")
HEADER = {"gpu": "cpu", "driver": "none", "torch": "2", "triton": "3", "commit": "abc"}


def test_the_sampler_runs_every_mode_mask_and_cap_of_the_issue():
    runs = list(sampler.runs())
    assert len(set(runs)) == len(runs)
    assert {r.mode for r in runs} == set(sampler.MODES)
    assert {(r.mode, r.mask) for r in runs if r.cap_gb is None} >= {("fast fp8", m) for m in ("exact", "25%", "12.5%")}
    assert {r.cap_gb for r in runs} == {None, 24, 48, 80}
    assert {r.mode: r.fast and (r.fast.precision, r.fast.attention) for r in runs} == {
        "fast fp8": ("fp8", "fp8"),
        "fast fp8 linear": ("fp8", "bf16"),
        "fast bf16": ("bf16", "bf16"),
        "eager": None,
        "torch.compile": None,
    }
    for mode in sampler.MODES:
        assert {(r.preset, r.steps) for r in runs if r.mode == mode} >= {
            (sampler.DENSE, 8),
            (sampler.FIRST_STAGE, 8),
            (sampler.SECOND_STAGE, 5),
        }


def test_sampler_runs_of_every_kind_are_results(tmp_path):
    bench, results = sampler.Bench(CPU, tiny=True), Results(tmp_path / "r.json", HEADER)
    for run in (
        sampler.Run(sampler.BASE, "1080p", "fast fp8", "25%", steps=3),
        sampler.Run(sampler.BASE, "1080p", "eager", steps=3),
        sampler.Run(sampler.SECOND_STAGE, "1080p", "fast bf16", steps=2),
    ):
        entry = bench.run(run, seconds=60)
        assert entry["s_per_step"] > 0 and entry["total_s"] >= entry["s_per_step"]
        assert entry["breakdown"] and "tiny model" in entry["note"]
        results.add_sampler(entry)
    assert len(read(tmp_path / "r.json")["sampler"]) == 3


def test_a_run_whose_time_is_up_says_how_many_steps_it_timed():
    entry = sampler.Bench(CPU, tiny=True).run(sampler.Run(sampler.BASE, "256p", "eager", steps=6), seconds=0.0)
    assert "2 of 6 steps timed" in entry["note"]
    assert entry["total_s"] == pytest.approx(6 * entry["s_per_step"])


@pytest.mark.slow
def test_a_run_that_fails_is_a_result_and_ends_no_other(monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(sampler, "random_eager", broken)
    path = tmp_path / "r.json"
    assert sampler.main(["--tiny", "--device", "cpu", "--results", str(path), "--modes", "eager,fast bf16"]) == 1
    found = read(path)["sampler"]
    assert {entry["note"] for entry in found if entry["mode"] == "eager"} == {
        "failed: RuntimeError: device-side assert"
    }
    assert all(entry["s_per_step"] for entry in found if entry["mode"] == "fast bf16")
    with pytest.raises(SystemExit):
        sampler.main(["--modes", "fast fp4"])
    assert "got 'fast fp4'" in capsys.readouterr().err


def test_a_gpu_named_without_an_index_can_be_capped(monkeypatch):
    capped = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 80 * 10**9}))

    def limit(fraction, device=None):  # refuses a device without an index, as torch's does
        capped.append((fraction, torch.cuda.memory._get_device_index(device)))

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    bench = sampler.Bench(torch.device("cuda"))
    bench._cap(None)
    bench._cap(24)
    assert capped == [(1.0, 0), (pytest.approx((24e9 - 2**29) / 80e9), 0)]


def test_a_larger_card_behaves_as_one_that_is_sold_as_24_gb():
    h200 = 150_754_820_096
    allowed = sampler.memory_fraction(24, h200) * h200
    assert allowed == pytest.approx(24e9 - 2**29)
    assert sampler.memory_fraction(None, h200) == 1.0
    assert sampler.memory_fraction(80, 24 * 2**30) == 1.0, "no card is made larger"


def test_memory_that_runs_out_is_a_result(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0")

    monkeypatch.setattr(sampler, "random_eager", full)
    entry = sampler.Bench(CPU).run(sampler.Run(sampler.BASE, "1080p", "eager"))
    assert entry["s_per_step"] is None and entry["note"] == "out of memory: CUDA out of memory"
    assert "out of memory" in sampler.line(entry)
