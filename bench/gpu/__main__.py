"""Everything that needs a GPU, in one command: ``make gpu [STAGES=tests,attn=200] [DRY=1]``, at most 9 minutes.

Stages run most important first, each in processes of its own with a share of the time; what one leaves, the next may
use. Every result is written as it is made, so that a cut run loses nothing, and a command that lost the GPU to a CUDA
error is started again for what it has not done. Nothing is fetched or installed; kernels that `make prime` compiled
before are not compiled. ``--dry`` runs every stage on the CPU,
with tiny shapes through Triton's interpreter, results to a temporary folder.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

import bench
from bench import LOST, targets
from bench.gpu import archive
from bench.gpu.stages import MINUTES, STAGES, Context, Stage, Step, chosen_stages, share
from bench.prime import file as primed
from bench.results import COMMIT_VARIABLE, FOLDER, Results, describe_machine, path_for

TOTAL_SECONDS = 540
# Of a dry run, whose stages only have to end: some 180 s on a free core, 100 of them for what is built anew.
DRY_SECONDS = 7200
# Of the total: what lies between the last stage's end and the command's, a killed process's included.
ENDING_SECONDS = 8
# A process that was killed may still be freeing the GPU's memory; it is waited for so long.
KILLED_SECONDS = 4
# Of its time a stage leaves this much unused, to write and end by itself.
SPARE_SECONDS = 8
TAIL_LINES = 30
# A command that lost the GPU is started again with at least this much left, of which it needs 10 s to start.
AGAIN_SECONDS = 20
CACHE_VARIABLE = "TRITON_CACHE_DIR"
KEY = "triton-key.txt"


def environment(dry: bool) -> dict[str, str]:
    """Environment of every stage: the checkout on the path, kernels compiled or interpreted."""
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


def run_step(step: Step, log: Path, seconds: float, dry: bool) -> tuple[int, str]:
    """(exit code, what to say of it) of a step, started again where it lost the GPU and time is left."""
    deadline, said, more = time.monotonic() + seconds, [], list[str]()
    while True:
        left = deadline - time.monotonic()
        minutes = f"{max(left - SPARE_SECONDS, 1) / 60:.2f}"
        command = [minutes if argument == MINUTES else argument for argument in [*step.command, *more]]
        code, outcome = run_command(command, log, left, dry)
        said.append("lost the GPU" if code == LOST else outcome)
        if code != LOST or step.again is None or deadline - time.monotonic() < AGAIN_SECONDS:
            return (1 if "lost the GPU" in said else code), ", ".join(said)
        more = list(step.again)


def run_stage(stage: Stage, context: Context, seconds: float) -> bool:
    """Run one stage, record how it went, and show the end of its output.

    Args:
        stage: What to run.
        context: Where; the outcome goes into its result file, as the results of the stage's commands do.
        seconds: When it is cut. A step has its :func:`share` of what is left.
    """
    log = context.results.with_suffix("") / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    began, passed, said = time.monotonic(), True, []
    steps = stage.steps(context)
    for i, step in enumerate(steps):
        if not step.command:
            said.append(step.absent)
            continue
        code, outcome = run_step(step, log, share(steps[i:], seconds - (time.monotonic() - began)), context.dry)
        passed &= code == 0
        said.append(outcome)
    took = time.monotonic() - began
    if log.is_file():
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
    print(f"== {stage.name}: {'; '.join(said)} ({took:.0f} s of {max(seconds, 0):.0f})\n", flush=True)
    for partial in context.results.parent.glob("*.partial"):  # of a write that was cut
        partial.unlink()
    entry = {"name": stage.name, "passed": passed, "seconds": round(took, 1), "outcome": "; ".join(said)}
    Results(context.results, context.header).add("stages", entry)  # into which the stage wrote meanwhile
    return passed


def run_stages(stages: Sequence[Stage], context: Context, deadline: float) -> dict[str, bool]:
    """Run stages one after another; which of them passed.

    A stage ends by its own place in the plan, which is the deadline for the last one: what an earlier one left is its
    own to use, and what one took too long, a killed process's seconds, the next ones lack.

    Args:
        stages: What to run, in this order.
        context: Where.
        deadline: On ``time.monotonic``'s clock: when the last stage is cut.
    """
    passed, planned = {}, 0.0
    began = time.monotonic()
    scale = (deadline - began) / sum(stage.seconds for stage in stages)
    for stage in stages:
        planned += scale * stage.seconds
        passed[stage.name] = run_stage(stage, context, began + planned - time.monotonic())
    return passed


def primed_cache(folder: Path, arch: str | None, logs: Path) -> dict[str, str]:
    """Environment in which Triton finds what `make prime` compiled for this GPU and this build of Triton; says what.

    Args:
        folder: That holds packed caches.
        arch: Compute capability, ``"90"``; None where there is no GPU, and nothing is compiled.
        logs: Gets Triton's key where no cache is for it, and nothing is added to the environment.
    """
    if arch is None:
        return {}
    key = primed.version_key()
    packed = primed.packed_in(folder, int(arch), key)
    if not packed.is_file():
        logs.mkdir(parents=True, exist_ok=True)
        (logs / KEY).write_text(key + "\n")
        print(
            f"no kernels are primed for sm_{arch} and this build of Triton, so every one compiles now; before the next "
            f"run: make prime PRIME_ARGS='--arch {arch} --key {logs / KEY}'\n",
            flush=True,
        )
        return {}
    cache = primed.unpack(packed)
    print(f"{primed.kernels(cache)} kernels were compiled ahead: {packed}\n", flush=True)
    return {CACHE_VARIABLE: str(cache), bootstrap.PRIMED_VARIABLE: "1"}


@contextlib.contextmanager
def primed_kernels(folder: Path, arch: str | None, logs: Path) -> Iterator[None]:
    """Stages run with :func:`primed_cache`, unless a cache is named already; says how much they compile beside it."""
    found = {} if CACHE_VARIABLE in os.environ else primed_cache(folder, arch, logs)
    if not found:
        yield
        return
    cache = Path(found[CACHE_VARIABLE])
    before = primed.kernels(cache)
    try:
        with mock.patch.dict(os.environ, found):
            yield
    finally:
        print(f"{primed.kernels(cache) - before} kernels compiled beside the {before} that were there", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    stages = f"{', '.join(stage.name for stage in STAGES)}; tests=200 gives one another share of the time"
    parser.add_argument("--stages", default="", help=stages)
    parser.add_argument("--archive", type=Path, help="one .tgz of all that is left, kept whole while stages run")
    for name in ("sampler", "tune"):
        parser.add_argument(f"--{name}", default="", metavar="OPTIONS", help=f"more options of bench.{name}")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny shapes, results to a temporary folder")
    parser.add_argument("--folder", type=Path, help="where results go, by default bench/results")
    parser.add_argument(
        "--seconds", type=float, help=f"for all chosen stages together; {TOTAL_SECONDS}, dry {DRY_SECONDS}"
    )
    options = parser.parse_args(argv)
    began = bench.began(argv)
    more = {f"bench.{name}": shlex.split(getattr(options, name)) for name in ("sampler", "tune")}
    chosen = chosen_stages(options.stages, every=options.dry)
    seconds = options.seconds if options.seconds is not None else DRY_SECONDS if options.dry else TOTAL_SECONDS
    if seconds <= ENDING_SECONDS:
        parser.error(f"argument --seconds: must be above {ENDING_SECONDS}, got {seconds:g}")
    if not options.dry and not torch.cuda.is_available():
        print("make gpu: needs a CUDA device; `make gpu DRY=1` tries every stage on the CPU", file=sys.stderr)
        return 2
    folder = options.folder or (Path(tempfile.mkdtemp(prefix="happyhorse-gpu-")) if options.dry else FOLDER)
    header = describe_machine(torch.device("cpu" if options.dry else "cuda"))
    path = path_for(header, folder)
    context = Context(options.dry, path, header, more)
    print(f"{header['gpu']}, torch {header['torch']}, triton {header['triton']}, results: {path}\n", flush=True)
    logs = path.with_suffix("") / "logs"
    kept = archive.kept(path.parent, options.archive) if options.archive else contextlib.nullcontext()
    compiled = primed_kernels(primed.FOLDER, None if options.dry else header["capability"], logs)
    # All stages are of one commit, whatever is committed or edited meanwhile.
    of_commit = mock.patch.dict(os.environ, {COMMIT_VARIABLE: header["commit"]})
    with kept, of_commit, compiled:
        passed = run_stages(chosen, context, began + seconds - ENDING_SECONDS)
    if not options.dry:
        print(targets.text(Results(path, header).data) + "\n")
    print(
        f"{time.monotonic() - began:.0f} s; " + ", ".join(f"{k} {'ok' if v else 'FAILED'}" for k, v in passed.items())
    )
    print(f"results: {path}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` ends what it started
    sys.exit(main())
