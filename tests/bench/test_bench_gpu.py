"""`make gpu` without a GPU: stages and their time, what is cut or lost, the archive, the dry run end to end."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench.bootstrap import ROOT
from bench.cases import cases, select
from bench.gpu import __main__ as gpu
from bench.gpu import archive, stages
from bench.gpu.stages import MINUTES, STAGES, Context, Stage, Step, chosen_stages
from bench.measure.comparison import implementations
from bench.results import read

HEADER = {"gpu": "cpu", "driver": "none", "torch": "2", "triton": "3", "commit": "abc"}


def test_all_stages_take_at_most_nine_minutes():
    assert sum(stage.seconds for stage in chosen_stages("")) <= gpu.TOTAL_SECONDS - gpu.ENDING_SECONDS
    assert gpu.TOTAL_SECONDS <= 9 * 60 and gpu.KILLED_SECONDS < gpu.ENDING_SECONDS


@pytest.mark.slow
def test_stages_that_never_end_are_cut_within_the_total(tmp_path, monkeypatch):
    never = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
    found = [Stage(name, size, lambda _: [Step(never)] * 2) for name, size in (("a", 10), ("b", 10), ("c", 20))]
    monkeypatch.setattr(stages, "STAGES", found)
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

    def stage_that_takes(stage, context, seconds):
        given.append(seconds)
        clock[0] += wanted if wanted <= seconds else max(seconds, 0) + overrun * (seconds > 0)
        return wanted <= seconds

    monkeypatch.setattr(gpu, "run_stage", stage_that_takes)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    deadline = 1000.0 + gpu.TOTAL_SECONDS - gpu.ENDING_SECONDS
    passed = gpu.run_stages(STAGES, None, deadline)
    assert clock[0] <= deadline + overrun < 1000.0 + gpu.TOTAL_SECONDS
    assert list(passed) == [stage.name for stage in STAGES]
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
from bench.gpu import __main__ as gpu
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


def commands(name, dry=False):
    (stage,) = chosen_stages(name)
    return [step.command for step in stage.steps(Context(dry, ROOT / "r.json"))]


def test_options_go_to_the_commands_of_their_module_alone():
    context = Context(False, ROOT / "r.json", more={"bench.sampler": ["--modes", "eager"]})
    for stage in chosen_stages("sampler,tune"):
        (step,) = stage.steps(context)
        assert (step.command[-2:] == ["--modes", "eager"]) is (stage.name == "sampler")


def test_the_stage_of_the_other_sizes_times_no_case_again_without_its_peers():
    (command,) = commands("sizes")
    assert command[command.index("--scope") + 1] == "rest" and command[command.index("--peers") + 1] == "none"


def test_an_implementation_shares_a_process_with_another_one_only_once_its_gates_are_known():
    checks = [command[command.index("--impl") + 1] for command in commands("check")]
    assert checks == ["triton", "cuda"]
    for name, kept_apart in (("attn", ["hopper"]), ("linear", ["hopper", "cuda"])):
        *gates, turns, compiled = commands(name)
        assert [command[command.index("--impl") + 1] for command in gates] == kept_apart
        assert all("--gates" in command for command in gates)
        for command, peers, keep in ((turns, "quick", "gates"), (compiled, "all", "all")):
            assert command[command.index("--peers") + 1] == peers and command[command.index("--keep") + 1] == keep
            assert not {"--gates", "--impl"} & set(command)
    triton, *others, large = commands("tests")
    assert triton[triton.index("-k") + 1] == "not cuda and not hopper"
    assert [command[command.index("-k") + 1] for command in others] == ["hopper", "cuda"]
    assert "-n" not in large and not any("large" in argument for argument in triton), "it needs the memory of all"


def test_what_takes_long_and_shows_little_runs_only_when_it_is_named():
    default = {stage.name for stage in chosen_stages("")}
    assert {stage.name for stage in STAGES} - default == {"sanitize", "sizes", "tune"}
    assert [(stage.name, stage.seconds) for stage in chosen_stages("tune,attn=300")] == [("attn", 300), ("tune", 150)]


def test_the_sanitizer_looks_at_our_kernels_alone_and_at_all_of_them(monkeypatch):
    monkeypatch.setattr(stages, "sanitizer", lambda: "/usr/local/cuda/bin/compute-sanitizer")
    names = re.findall(r"def (\w+_kernel)\(", "".join(f.read_text() for f in (ROOT / "kernels").glob("*.py")))
    names += re.findall(
        r"HH_KERNEL(?:_OF_BLOCKS)?\((\w+),", "".join(f.read_text() for f in (ROOT / "csrc/device").glob("*.cu"))
    )
    assert len(names) > 10
    for command in commands("sanitize"):
        parts = [argument.removeprefix("kns=") for argument in command if argument.startswith("kns=")]
        assert [name for name in names if not any(part in name for part in parts)] == []
        assert not any(part in name for part in parts for name in ("vectorized_elementwise_kernel", "reduce_kernel"))
        assert command[command.index("--report-api-errors") + 1] == "no"
        assert command[command.index("--target-processes") + 1] == "application-only"


def test_every_case_is_timed_by_a_default_stage():
    found = set()
    for stage in chosen_stages(""):
        for step in stage.steps(Context(False, ROOT / "r.json")):
            if "--cases" in step.command:
                words = step.command[step.command.index("--cases") + 1]
                found |= {case.name for case in select(cases("main"), words)}
    assert found == {case.name for case in cases("main")}


def test_every_gpu_test_is_run():
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_gpu_*.py")}
    assert {f"test_gpu_{name}.py" for name in stages.GPU_TESTS} == files


def test_stages_are_chosen_by_name_in_their_own_order():
    assert [stage.name for stage in chosen_stages("attn,tests")] == ["tests", "attn"]
    assert chosen_stages("", every=True) == list(STAGES)
    for wrong in ("atn", "attn=", "attn=soon")[::2]:
        with pytest.raises(ValueError, match=f"got '{wrong}'"):
            chosen_stages(wrong)


def stage(*commands):
    return Stage("planted", 10, lambda _: [c if isinstance(c, Step) else Step(c) for c in commands])


def run(stage, tmp_path, seconds=30.0):
    path = tmp_path / "r.json"
    passed = gpu.run_stage(stage, Context(True, path, HEADER), seconds)
    return passed, read(path)["stages"][0]


def test_a_stage_that_hangs_is_cut_with_all_it_started(tmp_path):
    # The child of the child would hold the log open, and the GPU.
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleep}']); {sleep}"
    began = time.monotonic()
    passed, written = run(stage([sys.executable, "-c", code]), tmp_path, seconds=2.0)
    assert time.monotonic() - began < 15
    assert passed is False and "cut after 2 s" in written["outcome"]


def test_a_failed_command_fails_its_stage_and_its_output_is_shown(tmp_path, capsys):
    passed, written = run(stage([sys.executable, "-c", "print('reason'); raise SystemExit(5)"]), tmp_path)
    assert passed is False and written["outcome"] == "exit code 5"
    assert "reason" in capsys.readouterr().out


def test_all_of_the_header_stays_though_a_stage_comes_before_the_first_entry(tmp_path):
    # Without the architecture, preferences would not know what the file is of.
    path = tmp_path / "r.json"
    gpu.run_stage(stage([]), Context(True, path, HEADER | {"capability": "90"}), 30.0)
    assert read(path)["capability"] == "90"


def test_a_step_that_lost_the_gpu_is_started_again_for_the_rest(tmp_path):
    code = "import sys; print(sys.argv[1:]); raise SystemExit(0 if 'all' in sys.argv else 3)"
    step = Step([sys.executable, "-c", code, "--minutes", MINUTES], again=("--keep", "all"))
    passed, written = run(stage(step), tmp_path)
    assert passed is False and written["outcome"] == "lost the GPU, ok"
    log = (tmp_path / "r" / "logs" / "planted.log").read_text().splitlines()
    assert log[1].endswith("'--keep', 'all']") and "0.3" in log[0], "30 s less what ending takes, in minutes"
    assert run(stage(Step([*step.command], again=None)), tmp_path)[1]["outcome"] == "lost the GPU"


def test_steps_have_the_time_of_their_weight(tmp_path):
    tell = [sys.executable, "-c", "import sys; print(sys.argv[1])", MINUTES]
    run(stage(Step(tell, 3), Step(tell, 1)), tmp_path, seconds=120.0)
    first, second = map(float, (tmp_path / "r" / "logs" / "planted.log").read_text().split())
    assert first == pytest.approx((90 - gpu.SPARE_SECONDS) / 60, abs=0.05)
    assert second > (110 - gpu.SPARE_SECONDS) / 60, "and what those before left"
    run(stage(Step(tell, 1, least=60.0), Step(tell, 3)), tmp_path, seconds=120.0)
    least, rest = map(float, (tmp_path / "r" / "logs" / "planted.log").read_text().split())
    assert least == pytest.approx((60 - gpu.SPARE_SECONDS) / 60, abs=0.05)
    assert rest > (110 - gpu.SPARE_SECONDS) / 60
    run(stage(Step(tell, 1, least=60.0)), tmp_path, seconds=20.0)
    assert float((tmp_path / "r" / "logs" / "planted.log").read_text()) <= 12 / 60, "no more than there is"


@pytest.mark.parametrize(
    ("named", "seconds"), [("", 540), ("attn=190,linear=130", 330), ("attn=190,linear=115,sampler=255", 565)]
)
def test_every_gate_can_be_reached(named, seconds):
    """A kernel whose gate has no time is left out of what is timed next."""
    context, chosen = stages.Context(False, Path("r.json")), stages.chosen_stages(named)
    scale = (seconds - gpu.ENDING_SECONDS) / sum(one.seconds for one in chosen)
    for one in chosen:
        left = scale * one.seconds
        for i, step in enumerate(steps := one.steps(context)):
            has = stages.share(steps[i:], left)
            left -= has
            if "--gates" in step.command:
                impl, words = (step.command[step.command.index(name) + 1] for name in ("--impl", "--cases"))
                gated = [case for case in select(cases("main"), words) if impl in implementations(case, impl, ())]
                assert has >= step.least >= 16 + 1.5 * len(gated) and len(gated) > 10
            elif one.name in ("attn", "linear"):
                assert has >= 12, step.command


def test_all_that_a_run_leaves_is_one_small_file(tmp_path):
    folder, target = tmp_path / "results" / "nvidia", tmp_path / "out" / "r.tgz"
    (folder / "r" / "logs").mkdir(parents=True)
    (folder / "r.json").write_text("{}")
    (folder / "r" / "logs" / "tests.log").write_bytes(random.Random(0).randbytes(3 << 20) + b"the end")
    with archive.kept(folder, target, every=0.1):
        for _ in range(100):
            if target.is_file():
                break
            time.sleep(0.1)
        with tarfile.open(target) as packed:
            assert set(packed.getnames()) == {"r.json", "r/logs/tests.log"}, "whole while stages run"
        (folder / "later.json").write_text("{}")
    with tarfile.open(target) as packed:
        assert "later.json" in packed.getnames()
        log = packed.extractfile("r/logs/tests.log").read()
    assert len(log) < archive.LOG_BYTES + 100 and log.endswith(b"the end")
    assert list(target.parent.iterdir()) == [target]


def test_a_commit_during_a_run_makes_no_other_file(tmp_path, monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    code = "from bench.results import commit; import bench.results as r; r._git = lambda *_: 'later'; print(commit())"
    monkeypatch.setattr(stages, "STAGES", [Stage("a", 10, lambda _: [Step([sys.executable, "-c", code])])])
    monkeypatch.setattr(gpu, "describe_machine", lambda device: HEADER)
    assert gpu.main(["--dry", "--folder", str(tmp_path), "--seconds", "60"]) == 0
    assert next(tmp_path.glob("*/*/logs/a.log")).read_text().split() == [HEADER["commit"]]
    assert "COMMIT" not in os.environ


def test_an_absent_tool_is_named_and_fails_nothing(tmp_path):
    passed, written = run(stage(Step([], absent="compute-sanitizer is absent: not on the PATH")), tmp_path)
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
    "bench.checks": ["self", "--impl", "cuda"],
    "bench.ops": ["--scope", "tiny", "--cases", "quantize/tiny/bf16", "--seconds", "0"],
    "bench.tune": ["--scope", "tiny", "--cases", "proj/tiny/fp8", "--limit", "0", "--seconds", "0"],
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
from bench import sampler, sampler_runs
bench = sampler.Bench(sampler.torch.device("cpu"), tiny=True)
entry = bench.run(sampler_runs.Run(sampler_runs.SECOND_STAGE, "1080p", "fast fp8", steps=5))
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
    assert {s["name"] for s in data["stages"] if s["passed"]} == {s.name for s in STAGES}
    assert data["entries"] and all(e["verified"] and e["impl"] == "triton" for e in data["entries"])
    assert {(s["mode"], s["mask"]) for s in data["sampler"]} >= {("fast fp8", "25%"), ("eager", "exact")}
