"""`make gpu` without a GPU: stages and their time, a cut stage, the dry run end to end; tuning and the sampler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import interpreter  # noqa: F401  (exact arithmetic)
import pytest
import torch

from bench import gpu, sampler, tune
from bench.bootstrap import ROOT
from bench.results import Results, read
from bench.timing import Stopwatch
from happyhorse_fast.kernels.launch import LaunchConfig, illegal, table

CPU = torch.device("cpu")
HEADER = {"gpu": "cpu", "driver": "none", "torch": "2", "triton": "3", "commit": "abc"}


def test_all_stages_take_at_most_nine_minutes():
    assert sum(stage.seconds for stage in gpu.STAGES) <= gpu.TOTAL_SECONDS - gpu.ENDING_SECONDS
    assert gpu.TOTAL_SECONDS <= 9 * 60 and gpu.KILLED_SECONDS < gpu.ENDING_SECONDS


def test_stages_that_never_end_are_cut_within_the_total(tmp_path, monkeypatch):
    never = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
    stages = [gpu.Stage(name, size, lambda *_: [never, never]) for name, size in (("a", 10), ("b", 10), ("c", 20))]
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "ENDING_SECONDS", 2)
    began = time.monotonic()
    assert gpu.main(["--dry", "--folder", str(tmp_path), "--seconds", "7"]) == 1
    assert 4 < time.monotonic() - began < 7
    (path,) = tmp_path.glob("*/*.json")
    written = read(path)["stages"]
    assert [(s["name"], s["passed"], s["outcome"].count("cut after")) for s in written] == [
        (name, False, 2) for name in "abc"
    ]


@pytest.mark.parametrize("overrun", [0, gpu.KILLED_SECONDS])
@pytest.mark.parametrize("wanted", [0, 30, 10_000])
def test_the_plan_never_passes_its_deadline_but_by_one_kill(wanted, overrun, monkeypatch):
    # Time is simulated. A stage takes what it wants or is cut, and then takes a while to die.
    clock, given = [1000.0], []

    def stage_that_takes(stage, context, results, seconds):
        given.append(seconds)
        clock[0] += wanted if wanted <= seconds else max(seconds, 0) + overrun * (seconds > 0)
        return wanted <= seconds

    monkeypatch.setattr(gpu, "run_stage", stage_that_takes)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    deadline = 1000.0 + gpu.TOTAL_SECONDS - gpu.ENDING_SECONDS
    passed = gpu.run_stages(gpu.STAGES, None, None, deadline)
    assert clock[0] <= deadline + overrun < 1000.0 + gpu.TOTAL_SECONDS
    assert list(passed) == [stage.name for stage in gpu.STAGES]
    if wanted == 0:
        assert given[-1] == pytest.approx(gpu.TOTAL_SECONDS - gpu.ENDING_SECONDS), "what was left is the last one's"


def test_no_time_starts_nothing(tmp_path):
    passed, written = run(stage([sys.executable, "-c", "open('planted', 'w')"]), tmp_path, seconds=-1.0)
    assert passed is False and written["outcome"] == "not started: no time left"


def test_an_interrupted_run_leaves_nothing_running(tmp_path):
    # What runs make gpu may have a limit of its own; the GPU must be free after it.
    file = str(tmp_path / "pid")
    child = f"import os, time; print(os.getpid(), file=open({file!r}, 'w'), flush=True); time.sleep(60)"
    code = f"""
import signal, sys
from bench import gpu
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
gpu.run_command([sys.executable, "-c", {child!r}], gpu.Path({str(tmp_path / "log")!r}), 50.0, True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    for _ in range(300):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=10) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_stage_of_the_other_sizes_times_no_case_again_without_its_peers():
    (sizes,) = gpu.chosen_stages("sizes")
    (command,) = sizes.commands(gpu.Context(False, ROOT / "r.json"), 1.0)
    assert command[command.index("--scope") + 1] == "rest" and "--no-peers" in command


def test_every_gpu_test_is_run():
    assert {f"test_gpu_{name}.py" for name in gpu.GPU_TESTS} == {p.name for p in (ROOT / "tests").glob("test_gpu_*.py")}


def test_stages_are_chosen_by_name_in_their_own_order():
    assert [stage.name for stage in gpu.chosen_stages("attn,tests")] == ["tests", "attn"]
    assert gpu.chosen_stages("") == list(gpu.STAGES)
    with pytest.raises(ValueError, match="got 'atn'"):
        gpu.chosen_stages("atn")


def stage(*commands):
    return gpu.Stage("planted", 10, lambda context, minutes: [list(c) for c in commands])


def run(stage, tmp_path, seconds=30.0):
    results = Results(tmp_path / "r.json", HEADER)
    passed = gpu.run_stage(stage, gpu.Context(True, results.path), results, seconds)
    return passed, read(results.path)["stages"][0]


def test_a_stage_that_hangs_is_cut_with_all_it_started(tmp_path):
    # The child of the child would hold the log open, and the GPU.
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleep}']); {sleep}"
    began = time.monotonic()
    passed, written = run(stage([sys.executable, "-c", code]), tmp_path, seconds=2.0)
    assert time.monotonic() - began < 15
    assert passed is False and "cut after 2 s" in written["outcome"]


def test_a_failed_command_fails_its_stage_and_its_output_is_shown(tmp_path, capsys):
    passed, written = run(stage([sys.executable, "-c", "print('reason'); raise SystemExit(3)"]), tmp_path)
    assert passed is False and written["outcome"] == "exit code 3"
    assert "reason" in capsys.readouterr().out


def test_all_of_the_header_stays_though_a_stage_comes_before_the_first_entry(tmp_path):
    # Without the architecture, preferences would not know what the file is of.
    results = Results(tmp_path / "r.json", HEADER | {"capability": "90"})
    gpu.run_stage(stage([]), gpu.Context(True, results.path), results, 30.0)
    assert read(results.path)["capability"] == "90"


def test_an_absent_tool_is_named_and_fails_nothing(tmp_path):
    passed, written = run(stage([]), tmp_path)
    assert passed is True and "compute-sanitizer is absent" in written["outcome"]


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "make gpu DRY=1" in capsys.readouterr().err


def test_sources_run_from_a_checkout_that_is_not_installed(tmp_path):
    # -S: no site-packages hooks, so the editable installation of this environment is not seen.
    for name in ("bench", "csrc", "happyhorse_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    code = """
import bench.bootstrap, happyhorse_fast.csrc.sources as sources, happyhorse_fast.kernels.launch as launch
print(launch.__file__, sources.__file__)
"""
    environment = {"PYTHONPATH": ":".join([str(tmp_path), *libraries]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    wanted = [str(tmp_path / "kernels" / "launch.py"), str(tmp_path / "csrc" / "sources.py")]
    assert done.stdout.split() == wanted, done.stderr


# What the machine of `make gpu` lacks of what this environment has: PyTorch's and the test tools' own needs are there.
ABSENT = ("av", "diffusers", "einops", "huggingface_hub", "pandas", "requests", "scipy", "transformers", "xdist")
STARTS = {
    "bench.checks": ["tiny", "--only", "proj/tiny/bf16"],
    "bench.ops": ["--scope", "tiny", "--cases", "quantize/tiny/bf16", "--seconds", "0"],
    "bench.tune": ["--dry", "--cases", "swiglu7"],
}


@pytest.mark.slow
def test_stages_import_nothing_that_the_gpu_machine_lacks():
    code = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
import importlib
import bench.bootstrap
for name, arguments in {STARTS!r}.items():
    assert importlib.import_module(name).main(arguments) == 0, name
from bench import sampler
bench = sampler.Bench(sampler.torch.device("cpu"), tiny=True)
entry = bench.run(sampler.Run(sampler.SECOND_STAGE, "1080p", "fast fp8", steps=5))
assert entry["s_per_step"] and "diffusers" in entry["note"], entry
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=gpu.environment(dry=True),
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_dry_run_passes_every_stage(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*/*.json")
    data = read(path)
    assert {s["name"] for s in data["stages"] if s["passed"]} == {s.name for s in gpu.STAGES}
    assert data["entries"] and all(e["verified"] and e["impl"] == "triton" for e in data["entries"])
    assert {(s["mode"], s["mask"]) for s in data["sampler"]} >= {("fast fp8", "25%"), ("eager", "exact")}


@pytest.mark.parametrize("target", list(tune.targets("main")), ids=lambda t: f"{t.variant}-{t.case.part}")
def test_every_candidate_is_legal_and_the_committed_one_is_first(target):
    found = tune.candidates(target, 90)
    assert found[0] == LaunchConfig(**table(target.stem)[target.variant]["90"])
    assert len(found) > 1 and len(set(found)) == len(found)
    for config in found:
        shared = tune._shared(target, config)
        assert illegal(config, 90, fp8=target.case.precision == "fp8", shared_bytes=shared) is None


def test_tuning_restores_the_table_and_writes_what_wins(tmp_path, monkeypatch):
    target = next(t for t in tune.targets("tiny") if "proj/tiny/fp8" in t.case.name)
    before = json.dumps(table(target.stem))
    # The interpreter's times mean nothing: warps decide here.
    monkeypatch.setattr(tune, "time_candidate", lambda t, a, config, *_: 1.0 if config.num_warps == 4 else 2.0)
    best = tune.tune(target, 89, Stopwatch(CPU), 0.0, time.monotonic() + 60)
    assert best is not None and best.num_warps == 4
    with tune.using(target, 89, best):
        assert table(target.stem)[target.variant]["89"]["num_warps"] == 4
    assert json.dumps(table(target.stem)) == before
    path = tune.write(tmp_path, target, 89, best)
    written, committed = json.loads(path.read_text()), json.loads((tune.CONFIGS / path.name).read_text())
    changed = written[target.variant].pop("89") != committed[target.variant].pop("89")
    assert changed and written == committed
    lines = (tune.CONFIGS / path.name).read_text().splitlines()
    assert sum(a != b for a, b in zip(path.read_text().splitlines(), lines, strict=True)) == 1, "one line changes"


def test_a_candidate_that_is_wrong_or_does_not_compile_does_not_count(monkeypatch):
    target = next(tune.targets("tiny"))
    config = tune.candidates(target, 89)[0]
    monkeypatch.setattr(tune, "problems", lambda *_: ["out: worst tile distance 1"])
    assert "gate" in str(tune.time_candidate(target, 89, config, Stopwatch(CPU), 0.0))

    def broken(*_):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(tune, "problems", broken)
    assert "out of resource" in str(tune.time_candidate(target, 89, config, Stopwatch(CPU), 0.0))


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
