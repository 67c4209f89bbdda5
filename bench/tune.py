"""Launch configurations: legal candidates timed at the full model's shapes, the best written to ``kernels/configs``.

    python -m bench.tune --cases swiglu7 --minutes 5 --folder kernels/configs

A candidate counts only if the case's gate is green with it; the best one and it take turns (`measure.timing`).
Users' processes never tune: what is committed runs.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import LOST, began
from bench.cases import BLOCK_SPARSE, Case, cases, select
from bench.hopper import ENTRIES, HOPPER
from bench.inputs import Given, call, make
from bench.measure.comparison import SETS
from bench.measure.gates import problems
from bench.measure.timing import SPAN_SECONDS, WARM_SECONDS, Failed, Prepared, Stopwatch
from happyhorse_fast.files import replacing
from happyhorse_fast.kernels.launch import HOPPER_ARCH, LaunchConfig, illegal, launched_with, shared_memory_bytes, table
from happyhorse_fast.ops.runtime.dispatch import STEMS
from happyhorse_fast.ops.runtime.obstacles import lost

CONFIGS = bootstrap.ROOT / "kernels" / "configs"
# A candidate must be faster than the best one by more than two runs of the same configuration differ.
LEAST_GAIN = 0.02
# What is varied around the committed configuration, per stem. Attention's block_n is its step of P, which accuracy
# depends on: it stays.
PRODUCTS = {"block_n": (128, 256), "block_k": (64, 128), "num_warps": (4, 8), "num_stages": (3, 4, 5)}
CHOICES = {"attention": {"num_warps": (4, 8), "num_stages": (2, 3, 4)}, "linear": PRODUCTS, "qkv": PRODUCTS}
GROUP_M = (8, 16, 32)
"""Varied for the best of the rest alone, a third of the candidates: it changes what is read from L2, not what runs."""


def variant(case: Case) -> str:
    """Entry of its stem's table that a case is launched with; "" for what is not tuned, or by another case."""
    if case.op == BLOCK_SPARSE:
        return f"{case.precision}_d{case.plan.head_dim}" if case.part in ("window", "25%") else ""
    return {
        "fp8_linear_activation": f"{case.precision}_{case.part}",
        "fp8_linear_residual": f"{case.precision}_residual",
        "qkv_linear": f"qkv_{case.precision}",
    }.get(case.op, "")


def candidates(case: Case, arch: int) -> list[LaunchConfig]:
    """Legal configurations, the committed one first, then, where there are both, the other kernel's.

    Raises:
        LookupError: The table has no entry for the architecture.
    """
    committed = table(STEMS[case.op]).get(variant(case), {}).get(str(arch))
    if committed is None:
        raise LookupError(f"{STEMS[case.op]} {variant(case)} has no configuration for sm_{arch}")
    base = LaunchConfig(**committed)
    choices = CHOICES[STEMS[case.op]]
    made = [base]
    if arch == HOPPER_ARCH and variant(case) in ENTRIES[STEMS[case.op]]:
        made.append(replace(base, hopper=not base.hopper))
    plain = replace(base, hopper=False)  # what varies is the plain kernel's
    for values in itertools.product(*choices.values()):
        config = replace(plain, **dict(zip(choices, values, strict=True)))
        why_not = illegal(config, arch, fp8=case.precision == "fp8", shared_bytes=_shared(case, config))
        if why_not is None and config not in made:
            made.append(config)
    return made


def _shared(case: Case, config: LaunchConfig) -> int:
    element = 1 if case.precision in ("int8", "fp8") else 2
    if STEMS[case.op] == "attention":  # stages of k and v, and the query tile
        d = case.plan.head_dim
        return (2 * config.num_stages * config.block_n + config.block_m) * d * element
    return shared_memory_bytes(config, element)


def prepare(case: Case, arch: int, config: LaunchConfig, stopwatch: Stopwatch, *, dry: bool) -> Prepared | str:
    """A configuration that is ready to take turns, or why it does not count."""
    device = stopwatch.device
    impl = HOPPER if config.hopper else "triton"
    passed = {(variant(case), arch): config}

    def launch(given: Given) -> None:
        with launched_with(STEMS[case.op], passed):
            call(case, given, impl)

    try:
        with launched_with(STEMS[case.op], passed):
            found = problems(case, make(case, device), impl)
        if found:
            return f"gate: {found[0]}"
        sets = (make(case, device, seed) for seed in range(SETS))
        return stopwatch.prepare([functools.partial(launch, given) for given in sets], dry=dry)
    except Exception as error:  # out of shared memory or registers, whatever the compiler raises
        return f"{type(error).__name__}: {str(error)[:120]}"


def beaten(best: Prepared, candidate: Prepared, stopwatch: Stopwatch, seconds: float) -> tuple[bool, str]:
    """(whether a candidate is faster than the best by more than the noise, both times in words).

    Both take turns: briefly, and where the candidate wins again for a whole span on a warm chip, which decides.

    Raises:
        Failed: A call raised.
    """
    said = []
    spans = ((seconds, 0.0), (max(SPAN_SECONDS, seconds), WARM_SECONDS)) if seconds else ((0.0, 0.0),)
    for timed, warm in spans:
        span = stopwatch.interleave({"best": best, "candidate": candidate}, seconds=timed, warm=warm)
        ours, theirs = (span.timings[name].median_ms for name in ("candidate", "best"))
        said.append(f"{ours:.4g} ms beside {theirs:.4g}")
        if ours >= theirs * (1 - LEAST_GAIN):
            return False, ", ".join(said)
    return True, ", ".join(said)


def write(folder: Path, case: Case, arch: int, config: LaunchConfig) -> Path:
    """Put a configuration into a stem's table, in the committed files' format; starts from the committed table."""
    path = folder / f"{STEMS[case.op]}.json"
    source = path if path.is_file() else CONFIGS / path.name
    data = json.loads(source.read_text())
    fields = list(next(iter(data[variant(case)].values())))
    hopper = {"hopper": True} if config.hopper else {}
    data[variant(case)][str(arch)] = {name: getattr(config, name) for name in fields} | hopper
    lines = []
    for entry, by_arch in data.items():
        inner = ",\n".join(f'    "{name}": {json.dumps(of_arch)}' for name, of_arch in by_arch.items())
        lines.append(f'  "{entry}": {{\n{inner}\n  }}')
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path, end=".partial") as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def tune(
    case: Case, arch: int, stopwatch: Stopwatch, seconds: float, deadline: float, limit: int | None = None
) -> LaunchConfig | None:
    """The best of the first ``limit`` candidates where it beats the committed one by more than the noise, else None.

    Raises:
        RuntimeError: A candidate took the GPU from this process.
    """
    first, *others = candidates(case, arch)
    best, chosen = prepare(case, arch, first, stopwatch, dry=not seconds), None
    state = best if isinstance(best, str) else f"about {best.about_ms:.4g} ms"
    print(f"{STEMS[case.op]} {variant(case)} on {case.name}: committed {state}", flush=True)

    def groups() -> Iterator[LaunchConfig]:
        if limit is None:
            tuned = chosen or first
            yield from (replace(tuned, group_m=m) for m in GROUP_M if tuned.group_m not in (0, m))  # attention has none

    for config in itertools.chain(others[:limit], groups()):
        if time.monotonic() > deadline:
            print("  time is up", flush=True)
            break
        candidate = prepare(case, arch, config, stopwatch, dry=not seconds)
        won, said = False, candidate if isinstance(candidate, str) else "the first that counts"
        if not isinstance(candidate, str):
            try:
                won, said = (True, said) if isinstance(best, str) else beaten(best, candidate, stopwatch, seconds)
            except Failed as error:
                said = str(error)
        changed = {k: v for k, v in asdict(config).items() if v != getattr(first, k)}
        print(f"  {changed}: {said}", flush=True)
        if won:
            best, chosen = candidate, config
        reason = lost(stopwatch.device)
        if reason:
            raise RuntimeError(f"the GPU of this process is lost after {changed}: {reason}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scope", default="main", help="sizes to tune at")
    parser.add_argument("--cases", default="", help="comma-separated words of cases' names")
    parser.add_argument("--limit", type=int, help="candidates per entry, all by default")
    parser.add_argument("--folder", type=Path, help="write the best into tables there, such as kernels/configs")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.1,
        help="of turns that a candidate takes with the best before one whole span decides",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="start no more candidates after this long")
    options = parser.parse_args(argv)
    deadline, device = began(argv) + 60 * options.minutes, torch.device(options.device)
    found = [case for case in select(cases(options.scope), options.cases) if variant(case)]
    if device.type != "cuda" and not bootstrap.INTERPRETED:
        print("python -m bench.tune: needs a CUDA device", file=sys.stderr)
        return 2
    from happyhorse_fast.ops.runtime.triton.device import architecture

    arch, stopwatch = architecture(device), Stopwatch(device)
    for case in found:
        if time.monotonic() > deadline:
            break
        try:
            best = tune(case, arch, stopwatch, options.seconds, deadline, options.limit)
        except LookupError as error:
            print(f"skipped: {error}")
            continue
        except RuntimeError as error:
            print(f"STOPPED: {error}", flush=True)
            return LOST
        if best is not None and options.folder is not None:
            print(f"  {best} -> {write(options.folder, case, arch, best)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
