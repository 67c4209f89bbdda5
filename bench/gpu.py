"""Everything that needs a GPU, in one command: ``make gpu [STAGES=tests,attn] [DRY=1]``, at most 9 minutes.

Stages run most important first, each in a process of its own with a share of the time; what one leaves, the next may
use. Every result is written as it is made, so that a cut run loses nothing. Nothing is fetched or installed. ``--dry``
runs every stage on the CPU, with tiny shapes through Triton's interpreter, results to a temporary folder.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import bench
from bench.results import FOLDER, Results, describe_machine, path_for

TOTAL_SECONDS = 540
# Of a dry run, whose stages only have to end: some 180 s on a free core.
DRY_SECONDS = 1800
# Of the total: what lies between the last stage's end and the command's, a killed process's included.
ENDING_SECONDS = 8
# A process that was killed may still be freeing the GPU's memory; it is waited for so long.
KILLED_SECONDS = 4
# Of its time a stage leaves this much unused, to write and end by itself.
SPARE_SECONDS = 8
TAIL_LINES = 30
SANITIZER = "compute-sanitizer"
GPU_TESTS = ("ops", "model", "configs", "large")
"""Of tests/test_gpu_*.py, most important first."""


@dataclass(frozen=True)
class Context:
    """Where stages run.

    Attributes:
        dry: On the CPU, in the interpreter.
        results: The result file that stages write into.
    """

    dry: bool
    results: Path

    def python(self, *arguments: str) -> list[str]:
        """A command of this interpreter."""
        return [sys.executable, "-m", *arguments]

    @property
    def device(self) -> str:
        """Where tensors are."""
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: For ``STAGES``.
        seconds: Its share of the time.
        commands: (context, minutes) -> commands to run one after another; an empty one names what is absent.
    """

    name: str
    seconds: int
    commands: Callable[[Context, float], list[list[str]]]


def _build(context: Context, _: float) -> list[list[str]]:
    # Into the package's own folder, where it looks; a dry run leaves the checkout as it is.
    package = context.results.with_suffix("") / "build" if context.dry else bootstrap.ROOT / "happyhorse_fast"
    imports = context.python("bench.checks", "build", "--device", context.device)  # seconds: the build gets the rest
    return [imports, context.python("bench.checks", "native", "--into", str(package))]


def _check(context: Context, _: float) -> list[list[str]]:
    only = ["--only", "rmsnorm_quantize,fp8_linear"] if context.dry else []
    return [context.python("bench.checks", "self", "--device", context.device, *only)]


def _tests(context: Context, _: float) -> list[list[str]]:
    files = [str(bootstrap.ROOT / "tests" / f"test_gpu_{name}.py") for name in GPU_TESTS]
    plugins = ["-p", "bench.bootstrap", "-p", "no:cacheprovider"]
    return [context.python("pytest", *plugins, "-m", "gpu", "-v", "--benchmark-disable", "--durations=5", *files)]


def _sanitize(context: Context, _: float) -> list[list[str]]:
    # One case per kernel: racecheck is some hundred times slower than the kernel.
    only = "window/tiny/bf16,window/tiny/fp8,down/tiny,swiglu7/tiny/fp8,qkv,rmsnorm_quantize/tiny,select"
    inner = context.python("bench.checks", "tiny", "--device", context.device, "--only", only)
    if context.dry:
        return [context.python("bench.checks", "tiny", "--device", "cpu", "--only", "down/tiny/fp8")]
    tool = sanitizer()
    if tool is None:
        return [[]]
    options = ["--target-processes", "all", "--error-exitcode", "1", "--print-limit", "20"]
    # Without torch's cache of blocks, so that an access past a tensor is one past its allocation.
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return [[*uncached, tool, "--tool", name, *options, *inner] for name in ("memcheck", "racecheck")]


def sanitizer() -> str | None:
    """Path of compute-sanitizer, on the PATH or in CUDA's own folder; None where it is not there."""
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")


def _ops(scope: str, words: str, dry_words: str, *extra: str) -> Callable[[Context, float], list[list[str]]]:
    def commands(context: Context, minutes: float) -> list[list[str]]:
        what = ["--scope", "tiny" if context.dry else scope, "--cases", dry_words if context.dry else words]
        where = ["--device", context.device, "--results", str(context.results), "--minutes", f"{minutes:.2f}"]
        seconds = ["--seconds", "0"] if context.dry else []
        return [context.python("bench.ops", *what, *where, *seconds, *extra)]

    return commands


def _sampler(context: Context, minutes: float) -> list[list[str]]:
    where = ["--device", context.device, "--results", str(context.results), "--minutes", f"{minutes:.2f}"]
    return [context.python("bench.sampler", *where, *(["--tiny"] if context.dry else []))]


def _tune(context: Context, minutes: float) -> list[list[str]]:
    folder = context.results.with_suffix("") / "configs"
    where = ["--device", context.device, "--folder", str(folder), "--minutes", f"{minutes:.2f}"]
    dry = ["--scope", "tiny", "--cases", "proj/tiny/fp8", "--limit", "1", "--seconds", "0"] if context.dry else []
    return [context.python("bench.tune", *where, *dry)]


LINEAR = "fp8_linear,qkv,rmsnorm"
STAGES = (
    Stage("build", 40, _build),
    Stage("check", 45, _check),
    Stage("tests", 115, _tests),
    Stage("sanitize", 50, _sanitize),
    Stage("attn", 75, _ops("main", "attention,select", "attention-25%/tiny/fp8,attention-dense/tiny/bf16")),
    Stage("linear", 65, _ops("main", LINEAR, "down/tiny/fp8,qkv_linear/tiny/bf16")),
    Stage("sampler", 100, _sampler),
    Stage("sizes", 22, _ops("rest", "", "proj/tiny/fp8", "--no-peers")),
    Stage("tune", 20, _tune),
)
"""In the order they run."""


def chosen_stages(names: str) -> list[Stage]:
    """Stages by name, in their own order; all where there is no name.

    Raises:
        ValueError: No such stage.
    """
    wanted = [name for name in names.split(",") if name]
    for name in wanted:
        if name not in [stage.name for stage in STAGES]:
            raise ValueError(f"stages must be among {', '.join(s.name for s in STAGES)}; got {name!r}")
    return [stage for stage in STAGES if not wanted or stage.name in wanted]


def environment(dry: bool) -> dict[str, str]:
    """Of every stage: the checkout on the path, kernels compiled or interpreted."""
    path = os.pathsep.join(filter(None, [str(bootstrap.ROOT), os.environ.get("PYTHONPATH", "")]))
    given = {"MAX_JOBS": str(os.cpu_count()), **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    given["TRITON_INTERPRET"] = "1" if dry else "0"
    if dry:
        given |= {"CUDA_VISIBLE_DEVICES": "", "HAPPYHORSE_FAST_GPU_TESTS": "dry", "OMP_NUM_THREADS": "1"}
    return given


def run_command(command: Sequence[str], log: Path, seconds: float, dry: bool) -> tuple[int, str]:
    """(exit code, what to say of it) of a command whose output goes to a log; 124 where its time was up."""
    if seconds <= 0:
        return 124, "not started: no time left"
    with log.open("ab") as output:
        # A process group of its own, so that what it started ends with it.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(dry),
            cwd=bootstrap.ROOT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return 124, f"cut after {seconds:.0f} s{_killed(process)}"
        except BaseException:  # interrupted: what was started must not stay on the GPU
            _killed(process)
            raise
    return code, "ok" if code == 0 else f"exit code {code}"


def _killed(process: subprocess.Popen[bytes]) -> str:
    """Kill a process group; says where it does not end."""
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=KILLED_SECONDS)
    except subprocess.TimeoutExpired:
        return f", and still there {KILLED_SECONDS} s after it was killed"
    return ""


def run_stage(stage: Stage, context: Context, results: Results, seconds: float) -> bool:
    """Run one stage, record how it went, and show the end of its output.

    Args:
        stage: What to run.
        context: Where.
        results: The file that the outcome goes into; the stage's commands write into it as well.
        seconds: When it is cut. Every command may take an equal part of what is left.
    """
    log = context.results.with_suffix("") / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    began, passed, said = time.monotonic(), True, []
    commands = stage.commands(context, max(seconds - SPARE_SECONDS, 1) / 60)
    for i, command in enumerate(commands):
        if not command:
            said.append(f"{SANITIZER} is absent: not on the PATH, nor in /usr/local/cuda/bin")
            continue
        left = (seconds - (time.monotonic() - began)) / (len(commands) - i)
        code, outcome = run_command(command, log, left, context.dry)
        passed &= code == 0
        said.append(outcome)
    took = time.monotonic() - began
    if log.is_file():
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
    print(f"== {stage.name}: {'; '.join(said)} ({took:.0f} s of {max(seconds, 0):.0f})\n", flush=True)
    for partial in results.path.parent.glob("*.partial"):  # of a write that was cut
        partial.unlink()
    fresh = Results(results.path, results.header)  # stages wrote into the file meanwhile
    fresh.add_stage({"name": stage.name, "passed": passed, "seconds": round(took, 1), "outcome": "; ".join(said)})
    return passed


def run_stages(stages: Sequence[Stage], context: Context, results: Results, deadline: float) -> dict[str, bool]:
    """Run stages one after another; which of them passed.

    A stage ends by its own place in the plan, which is the deadline for the last one: what an earlier one left is its
    own to use, and what one took too long, a killed process's seconds, the next ones lack.

    Args:
        stages: What to run, in this order.
        context: Where.
        results: The file that outcomes go into.
        deadline: On ``time.monotonic``'s clock: when the last stage is cut.
    """
    passed, planned = {}, 0.0
    began = time.monotonic()
    scale = (deadline - began) / sum(stage.seconds for stage in stages)
    for stage in stages:
        planned += scale * stage.seconds
        passed[stage.name] = run_stage(stage, context, results, began + planned - time.monotonic())
    return passed


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", default="", help=", ".join(stage.name for stage in STAGES))
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny shapes, results to a temporary folder")
    parser.add_argument("--folder", type=Path, help="where results go, by default bench/results")
    parser.add_argument(
        "--seconds", type=float, help=f"for all chosen stages together; {TOTAL_SECONDS}, dry {DRY_SECONDS}"
    )
    options = parser.parse_args(argv)
    began = bench.began(argv)
    stages = chosen_stages(options.stages)
    seconds = options.seconds if options.seconds is not None else DRY_SECONDS if options.dry else TOTAL_SECONDS
    if seconds <= ENDING_SECONDS:
        parser.error(f"argument --seconds: must be above {ENDING_SECONDS}, got {seconds:g}")
    if not options.dry and not torch.cuda.is_available():
        print("make gpu: needs a CUDA device; `make gpu DRY=1` tries every stage on the CPU", file=sys.stderr)
        return 2
    folder = options.folder or (Path(tempfile.mkdtemp(prefix="happyhorse-gpu-")) if options.dry else FOLDER)
    header = describe_machine(torch.device("cpu" if options.dry else "cuda"))
    results = Results(path_for(header, folder), header)
    context = Context(options.dry, results.path)
    print(f"{header['gpu']}, torch {header['torch']}, triton {header['triton']}, results: {results.path}\n", flush=True)
    passed = run_stages(stages, context, results, began + seconds - ENDING_SECONDS)
    print(
        f"{time.monotonic() - began:.0f} s; " + ", ".join(f"{k} {'ok' if v else 'FAILED'}" for k, v in passed.items())
    )
    print(f"results: {results.path}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` ends what it started
    sys.exit(main())
