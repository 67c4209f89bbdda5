"""The stages of ``make gpu``: what each runs, in which order, and which share of the time it has.

What a kernel never run before may do to a process is kept from what others measured: Gluon's and CUDA's kernels are
held against their gates in processes of their own. Those that passed then take turns with Triton's and with peers in
one process, since only times of one span are comparable; and once more with the peers that compile, in another.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import dataclasses
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import cases, select
from bench.hopper import HOPPER
from bench.measure.comparison import implementations

SANITIZER = "compute-sanitizer"
SANITIZED = ("block_sparse_attention", "fp8_linear", "rmsnorm", "qkv", "qk_norm", "quantize", "_blocks", "order_rows")
"""Parts of our kernels' names: the gates' own products in float64 are not instrumented, nor blamed."""
GPU_TESTS = ("ops", "model", "step", "configs", "frames", "pipeline", "large")
"""Of tests/gpu/test_gpu_*.py, most important first."""
WORKERS = 6
"""Processes of tests at a time: compiling bounds them, and each holds up to 6 GB of GPU memory."""
MINUTES = "{minutes}"
"""Stands in a command for the minutes it has."""
LINEAR = "fp8_linear,qkv,quantize,select"


@dataclass(frozen=True)
class Context:
    """The place that stages run in.

    Attributes:
        dry: On the CPU, in the interpreter.
        results: The result file that stages write into.
        header: Of that file.
        more: Further options of a module's commands, such as ``{"bench.sampler": ["--modes", "eager"]}``.
    """

    dry: bool
    results: Path
    header: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def python(self, module: str, *arguments: str) -> list[str]:
        """A command of this interpreter."""
        return [sys.executable, "-m", module, *arguments, *self.more.get(module, ())]

    def bench(self, module: str, *arguments: str) -> list[str]:
        """A command that writes results for as long as it has time."""
        where = ("--device", self.device, "--results", str(self.results), "--minutes", MINUTES)
        return self.python(module, *where, *arguments)

    @property
    def device(self) -> str:
        """Device of the tensors."""
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Step:
    """A command of a stage.

    Attributes:
        command: What to run; empty where a tool is absent.
        weight: Its part of the time that the stage has left, beside those of the steps after it.
        again: What to add when it is started again after the GPU was lost to it; None where that makes no sense.
        absent: What is missing, where the command is empty.
        least: Seconds that it has at least, of what the stage has left.
    """

    command: Sequence[str]
    weight: float = 1.0
    again: Sequence[str] | None = None
    absent: str = ""
    least: float = 0.0


def share(steps: Sequence[Step], left: float) -> float:
    """Seconds of the first of some steps that have so many together."""
    return max(left * steps[0].weight / sum(step.weight for step in steps), min(steps[0].least, left))


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: For ``STAGES``.
        seconds: Its share of the time.
        steps: Context -> commands to run one after another.
        default: Whether it runs where no stages are named; a dry run has all.
    """

    name: str
    seconds: float
    steps: Callable[[Context], list[Step]]
    default: bool = True


def _build(context: Context) -> list[Step]:
    # Into the package's own folder, where it looks; a dry run leaves the checkout as it is.
    package = context.results.with_suffix("") / "build" if context.dry else bootstrap.ROOT / "happyhorse_fast"
    return [Step(context.python("bench.checks", "native", "--into", str(package)))]


def _check(context: Context) -> list[Step]:
    of = ("bench.checks", "self", "--device", context.device)
    if context.dry:
        return [Step(context.python(*of, "--only", "rmsnorm_quantize,fp8_linear"))]
    return [Step(context.python(*of, "--impl", impl), weight, ()) for impl, weight in (("triton", 2), ("cuda", 1))]


def _tests(context: Context) -> list[Step]:
    plugins = ("-p", "bench.bootstrap", "-p", "bench.gpu.pytest_plugin", "-p", "no:cacheprovider")
    options = ("-m", "gpu", "-v", "--benchmark-disable", "--durations=5", "--tb=short")
    files = {name: str(bootstrap.ROOT / "tests" / "gpu" / f"test_gpu_{name}.py") for name in GPU_TESTS}
    one_by_one = context.python("pytest", *plugins, *options)
    if context.dry:
        return [Step([*one_by_one, *files.values()])]
    parallel = ("-n", str(WORKERS), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    large = files.pop("large")  # needs 24 GiB that nobody else has
    return [
        Step([*one_by_one, *parallel, "-k", "not cuda and not hopper", *files.values()], 6),
        Step([*one_by_one, *parallel, "-k", "hopper", *files.values()], 2),
        Step([*one_by_one, *parallel, "-k", "cuda", files["ops"]], 2),
        Step([*one_by_one, large]),
    ]


def _sanitize(context: Context) -> list[Step]:
    gates = context.python("bench.ops", "--device", context.device, "--scope", "tiny", "--gates", "--cases")
    if context.dry:
        return [Step([*gates, "down/tiny/fp8"])]
    tool = sanitizer()
    if tool is None:
        return [Step([], absent=f"{SANITIZER} is absent: not on the PATH, nor in /usr/local/cuda/bin")]
    # One case per kernel and epilogue: racecheck is some hundred times slower than the kernel.
    only = "window/tiny,25%/tiny,dense/tiny/bf16,down/tiny,swiglu7/tiny,gelu7/tiny,qkv,quantize,select"
    # torch and cuda-bindings probe the driver for what it may lack, which is no error; compilers are started as well.
    options = ("--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "20")
    names = [option for part in SANITIZED for option in ("--kernel-name", f"kns={part}")]
    # Without torch's cache of blocks, so that an access past a tensor is one past its allocation.
    uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    return [
        Step([*uncached, tool, "--tool", name, *options, *names, "--error-exitcode", "1", *gates, only])
        for name in ("memcheck", "racecheck")
    ]


def sanitizer() -> str | None:
    """Path of compute-sanitizer, on the PATH or in CUDA's own folder; None where it is not there."""
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")


def _ops(scope: str, words: str, dry_words: str) -> Callable[[Context], list[Step]]:
    def steps(context: Context) -> list[Step]:
        if context.dry:
            command = context.bench("bench.ops", "--scope", "tiny", "--cases", dry_words, "--seconds", "0")
            parts = ([],) if scope == "rest" else (["--gates"], ["--keep", "gates"])
            return [Step([*command, *part]) for part in parts]
        command, again = context.bench("bench.ops", "--scope", scope, "--cases", words), ("--keep", "all")
        if scope == "rest":
            return [Step([*command, "--impl", "triton", "--peers", "none"], again=again)]
        gates = []
        # CUDA's attention takes twice as long as the others and would have half of every span.
        for impl in (HOPPER,) if "attention" in words else (HOPPER, "cuda"):
            count = sum(impl in implementations(case, "triton", (impl,)) for case in select(cases(scope), words))
            # Predicted: 8 s to start, 8 to end, and 1.5 a case.
            gates.append(Step([*command, "--impl", impl, "--gates"], again=again, least=16 + 1.5 * count))
        turns = Step([*command, "--peers", "quick", "--keep", "gates"], 6, again)
        return [*gates, turns, Step([*command, "--peers", "all", *again], 3, again)]  # with those that compile

    return steps


def _sampler(context: Context) -> list[Step]:
    return [Step(context.bench("bench.sampler", *(("--tiny",) if context.dry else ())), again=("--keep", "all"))]


def _tune(context: Context) -> list[Step]:
    folder = context.results.with_suffix("") / "configs"
    where = ("--device", context.device, "--folder", str(folder), "--minutes", MINUTES)
    dry = ("--scope", "tiny", "--cases", "proj/tiny/fp8", "--limit", "1", "--seconds", "0") if context.dry else ()
    return [Step(context.python("bench.tune", *where, *dry))]


STAGES = (
    Stage("build", 40, _build),
    Stage("check", 60, _check),
    Stage("tests", 110, _tests),
    Stage("sampler", 102, _sampler),
    Stage(
        "attn",
        105,
        _ops("main", "attention", "attention-25%/tiny/fp8,attention-dense/tiny/bf16,attention-dense/tiny/int8_qk"),
    ),
    Stage("linear", 115, _ops("main", LINEAR, "down/tiny/fp8,qkv_linear/tiny/bf16")),
    Stage("sanitize", 150, _sanitize, default=False),
    Stage("sizes", 300, _ops("rest", "", "proj/tiny/fp8"), default=False),
    Stage("tune", 150, _tune, default=False),
)
"""In the order they run."""


def chosen_stages(names: str, *, every: bool = False) -> list[Stage]:
    """Stages by name, in their own order: ``"tests,attn=200"`` gives attn a share of 200 s.

    Args:
        names: Comma-separated; without one the default ones.
        every: Whether no name means all of them.

    Raises:
        ValueError: No such stage, or no such share.
    """
    known, wanted = {stage.name: stage for stage in STAGES}, dict[str, Stage]()
    for given in filter(None, names.split(",")):
        name, _, share = given.partition("=")
        if name not in known or not re.fullmatch(r"\d*", share):
            allowed = f"among {', '.join(known)}, or one with its seconds, tests=200"
            raise ValueError(f"stages must be {allowed}; got {given!r}")
        wanted[name] = dataclasses.replace(known[name], seconds=float(share or 0) or known[name].seconds)
    if not wanted:
        return [stage for stage in STAGES if every or stage.default]
    return [wanted[name] for name in known if name in wanted]
