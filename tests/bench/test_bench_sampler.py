"""The sampler benchmark: every mode, mask and cap, what is cut or fails, memory capped to a smaller card's."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from bench import LOST, sampler, sampler_runs
from bench.cases import TINY
from bench.hopper import attention_kernel, running
from bench.measure import random_model
from bench.measure.conditions import Monitor
from bench.report.data import gpu_results
from bench.results import FOLDER, Results, read
from bench.sampler_runs import BASE, DENSE, FIRST_STAGE, MODES, SECOND_STAGE, Run
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.fast.state import FastState
from happyhorse_fast.ops.runtime import dispatch
from happyhorse_fast.ops.runtime.dispatch import Choice
from happyhorse_fast.ops.runtime.obstacles import BackendError

CPU = torch.device("cpu")
HEADER = {"gpu": "cpu", "driver": "none", "torch": "2", "triton": "3", "commit": "abc"}


def test_the_sampler_runs_every_mode_mask_and_cap_of_the_issue():
    runs = list(sampler_runs.runs())
    assert len(set(runs)) == len(runs)
    assert {r.mode for r in runs} == set(MODES)
    assert {(r.mode, r.mask) for r in runs if r.cap_gb is None} >= {("fast fp8", m) for m in ("exact", "25%", "12.5%")}
    assert {r.cap_gb for r in runs} == {None, 24, 48, 80}
    assert {r.mode: r.fast and (r.fast.precision, r.fast.attention) for r in runs} == {
        "fast fp8": ("fp8", "fp8"),
        "fast int8": ("int8", "int8_qk"),
        "fast fp8 linear": ("fp8", "bf16"),
        "fast fp8 int8_qk": ("fp8", "int8_qk"),
        "fast fp8 int8_qk_fp8_v": ("fp8", "int8_qk_fp8_v"),
        "fast bf16": ("bf16", "bf16"),
        "eager": None,
        "torch.compile": None,
    }
    assert {r.mode: r.fast.rows_in_mlp for r in runs if r.fast} == {
        mode: 32768 if mode == "fast int8" else 65536 for mode in MODES if mode.startswith("fast")
    }
    assert {(r.mask, r.cap_gb) for r in runs if r.mode == "fast int8"} >= {
        ("exact", None),
        ("25%", None),
        ("exact", 24),
    }
    for mode in MODES:
        assert {(r.preset, r.steps) for r in runs if r.mode == mode} >= {
            (DENSE, 8),
            (FIRST_STAGE, 8),
            (SECOND_STAGE, 5),
        }


def test_sampler_runs_of_every_kind_are_results(tmp_path):
    bench, results = sampler.Bench(CPU, tiny=True), Results(tmp_path / "r.json", HEADER)
    for run, softmax in (
        (Run(BASE, "1080p", "fast fp8", "25%", steps=3), "running maximum"),
        (Run(BASE, "1080p", "fast fp8 int8_qk", steps=3), "bounded"),
        (Run(BASE, "1080p", "fast int8", steps=3), "bounded"),
        (Run(BASE, "1080p", "eager", steps=3), None),
        (Run(SECOND_STAGE, "1080p", "fast bf16", steps=2), "bounded"),
    ):
        entry = bench.run(run, seconds=60)
        assert entry["s_per_step"] > 0 and entry["total_s"] >= entry["s_per_step"]
        assert entry["breakdown"] and "tiny model" in entry["note"]
        assert entry.get("softmax") == softmax
        assert ("quantize_rows" in entry["breakdown"]) == (run.mode == "fast int8")
        results.add("sampler", entry)
    assert len(read(tmp_path / "r.json")["sampler"]) == 5


def test_a_model_that_is_kept_takes_the_mask_of_the_run():
    bench = sampler.Bench(CPU, tiny=True)
    for mask, selects in (("exact", False), ("25%", True), ("exact", False)):
        entry = bench.run(Run(BASE, "1080p", "fast fp8", mask, steps=2), seconds=60)
        assert ("select_blocks" in entry["breakdown"]) == selects


def test_a_run_says_at_which_clock_and_power_its_steps_ran():
    asked = []

    class Sampled(Monitor):
        def during(self, began, ended):
            asked.append(ended - began)
            return {"sm_mhz": 1420.0, "power_w": 698.6}

    bench = sampler.Bench(CPU, tiny=True, monitor=Sampled(CPU))
    began = time.monotonic()
    entry = bench.run(Run(BASE, "256p", "fast bf16"))
    assert (entry["sm_mhz"], entry["power_w"]) == (1420.0, 698.6)
    assert entry["total_s"] <= asked[0] < time.monotonic() - began, "of its steps, not of making the model"


def test_a_run_whose_time_is_up_says_how_many_steps_it_timed():
    entry = sampler.Bench(CPU, tiny=True).run(Run(BASE, "256p", "eager", steps=6), seconds=0.0)
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
    monkeypatch.setattr(sampler, "lost", lambda device: None)
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


def test_runs_are_chosen_by_parts_of_their_names_in_that_order():
    found = sampler_runs.chosen("15b/1080p/fast fp8/25%/whole,fp8/exact/24gb,sr-1080p/1080p/fast fp8/")
    assert [(r.preset, r.mask, r.cap_gb) for r in found] == [
        (BASE, "25%", None),
        (BASE, "exact", 24),
        (SECOND_STAGE, "exact", None),
    ]
    assert all(r.mode == "eager" for r in sampler_runs.chosen("", "eager"))
    for words, modes in (("fast fp4", ""), ("", "fast fp4")):
        with pytest.raises(ValueError, match="got 'fast fp4'"):
            sampler_runs.chosen(words, modes)
    first = [(r.mode, r.mask, r.cap_gb) for r in list(sampler_runs.runs())[:11]]
    assert first[:2] == [("fast fp8", "exact", None), ("fast fp8", "25%", None)]
    assert {mode for mode, mask, _ in first[:4] if mask == "exact"} == {
        f"fast fp8{a}" for a in ("", " linear", " int8_qk_fp8_v")
    }
    assert {cap for _, _, cap in first} == {None, 24, 48, 80}


def test_a_run_that_could_not_end_in_time_is_not_started(monkeypatch, tmp_path, capsys):
    started = []
    monkeypatch.setattr(sampler.Bench, "run", lambda self, run, seconds: started.append((run.name, seconds)) or ENTRY)
    words = ["--device", "cpu", "--runs", "15b/1080p-15s/fast fp8/exact/whole,15b/1080p/fast fp8/exact/whole"]
    assert sampler.main([*words, "--minutes", "1", "--seconds-per-run", "60"]) == 0
    ((name, seconds),) = started
    assert name.endswith("1080p/fast fp8/exact/whole") and seconds == pytest.approx(60 - 15 - 2 * 4.07, abs=1)
    assert "not run: happyhorse-1.0-15b/1080p-15s/fast fp8/exact/whole needs 86 s, 27 more" in capsys.readouterr().out


def test_steps_take_what_flops_predict():
    """Of clips that the prediction was not made from: another mask, other sizes, the second stage."""
    known = {field.name for field in dataclasses.fields(sampler_runs.Run)}
    taken = {}
    for data in gpu_results(FOLDER).values():
        for entry in data["sampler"]:
            run = sampler_runs.Run(**{name: value for name, value in entry.items() if name in known})
            if run.mode == "fast fp8" and entry["attention"] == "hopper" and entry["s_per_step"]:
                taken[run.resolution, run.mask, run.preset] = entry["s_per_step"] / run.step_seconds
    assert {("1080p", "25%", BASE), ("540p", "exact", BASE), ("256p", "exact", BASE)} < taken.keys() and len(taken) == 5
    assert all(0.95 < share < 1.3 for share in taken.values()), taken


ENTRY = {
    "preset": "p", "resolution": "1080p", "seconds": 5, "mode": "m", "mask": "exact", "cap_gb": None, "steps": 8,
    "s_per_step": 1.0, "total_s": 8.0, "peak_memory_gib": None, "note": "",
}  # fmt: skip


def test_runs_of_another_backend_are_not_left_out(monkeypatch, tmp_path):
    path, words = tmp_path / "r.json", "15b/1080p/eager/exact/whole,15b/1080p/fast fp8/exact/whole"
    results = Results(path, HEADER)
    for run in sampler_runs.chosen(words):
        kept = sampler.Bench(CPU, tiny=True, backend="hopper").run(run, seconds=0.0)
        assert kept.get("backend") == ("hopper" if run.fast else None)
        results.add("sampler", kept)
    assert [run.get("attention") for run in results.data["sampler"]] == [None, "reference"]
    timed = []
    monkeypatch.setattr(sampler, "open_results", lambda *_: Results(path, HEADER))
    monkeypatch.setattr(sampler.Bench, "run", lambda self, run, _: timed.append((self.backend, run.mode)) or ENTRY)
    monkeypatch.setattr(Results, "add", lambda *_: None)
    for backend in ("hopper", "triton"):
        sampler.main(["--tiny", "--device", "cpu", "--results", str(path), "--runs", words, "--keep", "all",
                      "--backend", backend])  # fmt: skip
    assert timed == [("triton", "fast fp8")]


def test_the_kernel_that_attention_ran_in_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gpu, fast = torch.device("cuda:0"), Run("", "", "fast fp8").fast
    choices = {"block_sparse_attention": Choice("block_sparse_attention", "triton", "")}
    state = FastState(ModelConfig.preset(BASE), fast, choices, torch.nn.Module)
    for backend, kernel in (("auto", "hopper"), ("hopper", "hopper"), ("triton", "triton")):
        with running(backend):
            assert attention_kernel(state, gpu) == kernel
    small = dataclasses.replace(state, config=state.config.replace(head_dim=64))
    assert attention_kernel(small, gpu) == "triton", "not measured, so not on"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert attention_kernel(state, gpu) == "triton"
    state.choices["block_sparse_attention"] = Choice("block_sparse_attention", "cuda", "")
    assert attention_kernel(state, gpu) == "cuda"


def test_a_red_self_check_keeps_nothing_from_being_timed_but_is_said(monkeypatch):
    asked = []

    def fast(config, fast, backend, device, seed):
        asked.append(backend)
        if backend == "auto":
            raise BackendError("strict: select_blocks would run as plain torch: triton's self-check failed")
        return random_model.random_fast(config, fast, "reference", torch.device("cpu"), seed)

    monkeypatch.setattr(sampler, "random_fast", fast)
    monkeypatch.setattr(sampler, "lost", lambda device: None)
    bench = sampler.Bench(CPU)
    bench.device = torch.device("cuda:0")
    bench._fast(bench._config(BASE).replace(**SMALLEST), Run("", "", "fast fp8").fast)
    assert asked == ["auto", "triton"] and bench._unverified.startswith("NOT VERIFIED")
    named = sampler.Bench(CPU, backend="cuda")
    named._fast(bench._config(BASE).replace(**SMALLEST), Run("", "", "fast fp8").fast)
    assert asked[2:] == ["cuda"] and named._unverified == ""


SMALLEST = {
    "num_layers": 1, "hidden_size": 128, "head_dim": 64, "num_heads_q": 2, "num_heads_kv": 1, "mm_layers": (),
    "local_attn_layers": (), "gelu7_layers": (),
}  # fmt: skip


def test_a_named_backend_is_not_checked_and_cuda_is_triton_where_it_has_no_kernel(monkeypatch):
    given = {}
    monkeypatch.setattr(random_model, "empty_accelerated", lambda config, fast, choices: given.update(choices) or 1 / 0)
    monkeypatch.setattr(random_model, "cuda_obstacle", lambda device: None)
    monkeypatch.setattr(random_model, "compute_capability", lambda device: 90)
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(dispatch, "_failures", lambda *_: pytest.fail("a self-check"))
    fast = Run("", "", "fast fp8").fast
    with pytest.raises(ZeroDivisionError):
        random_model.random_fast(None, fast, "cuda", torch.device("cuda"), 0)
    chosen = {op: choice.backend for op, choice in given.items()}
    assert chosen["rmsnorm_quantize"] == "cuda"
    assert (chosen["block_sparse_attention"], chosen["fp8_linear_residual"]) == ("triton", "triton")


def test_a_run_that_loses_the_gpu_ends_the_command_and_is_not_tried_again(monkeypatch, tmp_path):
    lost = []

    def crash(*_):
        lost.append("CUDA error: an illegal memory access was encountered")
        raise RuntimeError(lost[0])

    monkeypatch.setattr(sampler, "lost", lambda device: lost[0] if lost else None)
    monkeypatch.setattr(sampler, "random_eager", crash)
    path = tmp_path / "r.json"
    words = "15b/1080p/eager/exact/whole,sr-1080p/1080p/fast fp8/"
    arguments = ["--tiny", "--device", "cpu", "--results", str(path), "--runs", words, "--seconds-per-run", "0.1"]
    assert sampler.main(arguments) == LOST
    assert [entry["mode"] for entry in read(path)["sampler"]] == ["eager"], "the next run is not blamed"
    lost.clear()
    assert sampler.main([*arguments, "--keep", "all"]) == 0
    first, second = read(path)["sampler"]
    assert "illegal memory access" in first["note"] and second["s_per_step"]


def test_a_self_check_that_loses_the_gpu_leaves_the_run_to_the_next_process(monkeypatch, tmp_path):
    lost = []

    def fast(*_):
        lost.append("CUDA error: an illegal memory access was encountered")
        raise BackendError("triton's qkv_linear in fp8 ended this process's use of cuda:0; restart the process")

    monkeypatch.setattr(sampler, "lost", lambda device: lost[0] if lost else None)
    monkeypatch.setattr(sampler, "random_fast", fast)
    path = tmp_path / "r.json"
    arguments = ["--device", "cpu", "--results", str(path), "--runs", "15b/1080p/fast fp8/exact/whole"]
    assert sampler.main(["--tiny", *arguments]) == LOST
    assert not path.exists(), "no entry that --keep all would leave alone"


def test_layers_compile_without_unknown_sizes(monkeypatch):
    # With them a second mask makes sizes unknown and breaks every graph: 10 graphs in place of 4.
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: seen.append(options))
    bench = sampler.Bench(CPU)
    monkeypatch.setattr(bench, "_config", lambda preset: TINY)
    bench._model_for(Run(BASE, "1080p", "torch.compile"))
    assert seen == [{"dynamic": False}] * TINY.num_layers


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
    entry = sampler.Bench(CPU).run(Run(BASE, "1080p", "eager"))
    assert entry["s_per_step"] is None and entry["note"] == "out of memory: CUDA out of memory"
