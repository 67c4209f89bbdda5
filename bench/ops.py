"""Microbenchmarks of the ops: gate first, then time, peers of the same run, and the table.

    python -m bench.ops --scope main --cases attention      # see --help

A case whose gate is red gets no number, neither in the table nor in the results.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import functools
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import gates, roofline
from bench.cases import Case, cases, select
from bench.inputs import call, make, moved_bytes
from bench.peers import Inputs, Peer, all_peers, split
from bench.results import Json, Results, describe_machine, path_for
from bench.timing import Stopwatch, Timing

SETS = 2
"""Sets of inputs that calls rotate through."""
COLUMNS = ("case", "ms", "spread", "TFLOP/s", "useful", "GB/s", "roofline", "peers: their time over ours")


@dataclass
class Bench:
    """Where and how cases are timed.

    Attributes:
        device: Where they run.
        backend: Implementation of the ops.
        seconds: About how long each call is repeated.
        peaks: Ceilings that the roofline is of: the datasheet's, or measured ones for a device without.
        peers: Those that can run here.
        absent: Reasons of those that cannot, and of what failed.
    """

    device: torch.device
    backend: str
    seconds: float = 0.5
    peers: Sequence[Peer] = ()
    absent: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)
        self.measured = roofline.measured(self.device, self.stopwatch, seconds=min(self.seconds, 0.3))
        self.peaks = roofline.datasheet(self.device) or self.measured

    def gate(self, case: Case) -> list[str]:
        """What is wrong with the implementation on this case; an error it raises is."""
        try:
            return gates.problems(case, make(case, self.device), self.backend)
        except Exception as error:  # whatever a compiler or driver raises
            return [f"{type(error).__name__}: {error}"]

    def entry(self, case: Case) -> Json:
        """A case's result, without peers."""
        problems = self.gate(case)
        if problems:
            return red(case, self.backend, problems)
        calls = [functools.partial(call, case, make(case, self.device, seed), self.backend) for seed in range(SETS)]
        timing = self.stopwatch.time(calls, seconds=self.seconds)
        return timed(case, self.backend, timing, self.peaks)

    def add_peers(self, entry: Json, case: Case, *, slow: bool) -> None:
        """Time the peers that fit, into a verified entry."""
        fitting = [p for p in self.peers if p.slow == slow and p.fits(case)]
        if not entry["verified"] or not fitting:
            return
        inputs = Inputs(case, self.device)
        for peer in fitting:
            try:
                timing = self.stopwatch.time([peer.prepare(case, inputs)], seconds=self.seconds)
                entry["peers"][peer.name] = timing.median_ms
            except LookupError as error:
                self.absent[f"{peer.name} on {case.op}{'-' if case.part else ''}{case.part}"] = str(error)
            except Exception as error:  # a peer that breaks must not end the run
                self.absent[f"{peer.name} on {case.name}"] = f"{type(error).__name__}: {str(error)[:200]}"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def red(case: Case, impl: str, problems: Sequence[str]) -> Json:
    """The entry of a case that must not have a number."""
    numbers = dict.fromkeys(("median_ms", "tflops", "gbps", "roofline"))
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return {"case": case.name, "impl": impl, **numbers, "peers": {}, "verified": False, "reason": problems[0] + more}


def timed(case: Case, impl: str, timing: Timing, peaks: roofline.Peaks) -> Json:
    """The entry of a case that passed its gate."""
    flops, moved, seconds = case.computed_flops(), moved_bytes(case), timing.median_ms / 1e3
    return {
        "case": case.name,
        "impl": impl,
        "median_ms": timing.median_ms,
        "tflops": flops / seconds / 1e12,
        "gbps": moved / seconds / 1e9,
        "roofline": peaks.floor_ms(flops, moved, case.precision) / timing.median_ms,
        "peers": {},
        "verified": True,
        "tflops_useful": case.useful_flops() / seconds / 1e12,
        "low_ms": timing.low_ms,
        "high_ms": timing.high_ms,
    }


def row(entry: Json) -> list[str]:
    """A line of the table; a red case has its reason in place of numbers."""
    if not entry["verified"]:
        return [entry["case"], "-", "-", "-", "-", "-", "-", f"NOT VERIFIED: {entry['reason']}"]
    ours = entry["median_ms"]
    spread = (entry["high_ms"] - entry["low_ms"]) / ours
    peers = ", ".join(f"{name} {taken / ours:.2f}x" for name, taken in entry["peers"].items())
    flops = [f"{entry[k]:.3g}" if entry["tflops"] else "" for k in ("tflops", "tflops_useful")]
    return [
        entry["case"],
        f"{ours:.4g}",
        f"{spread:.0%}",
        *flops,
        f"{entry['gbps']:.4g}",
        f"{entry['roofline']:.1%}",
        peers,
    ]


def table(entries: Iterable[Json]) -> str:
    """Lines with aligned columns."""
    lines = [list(COLUMNS), *map(row, entries)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS) - 1)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:-1], widths[1:], strict=True)), line[-1]]
        )
        for line in lines
    )


def summary(bench: Bench, entries: Sequence[Json]) -> str:
    """The table, what it is a share of, and what is absent."""
    peaks = bench.peaks
    lines = [
        table(entries),
        "",
        f"roofline: {peaks.source}, {peaks.bandwidth:.3g} TB/s, bf16 {peaks.bf16:.4g}"
        + (f", fp8 {peaks.fp8:.4g} TFLOP/s" if peaks.fp8 else " TFLOP/s")
        + f"; measured here: {bench.measured.bandwidth:.3g} TB/s, bf16 {bench.measured.bf16:.4g}"
        + (f", fp8 {bench.measured.fp8:.4g} TFLOP/s" if bench.measured.fp8 else " TFLOP/s"),
        *(f"absent: {name}: {reason}" for name, reason in sorted(bench.absent.items())),
    ]
    return "\n".join(lines)


def run(bench: Bench, chosen: Sequence[Case], results: Results | None, deadline: float) -> list[Json]:
    """Time cases, ours and quick peers first, then the peers that compile; stops starting work at the deadline.

    Args:
        bench: Where and how.
        chosen: Cases, most important first.
        results: Written after every entry.
        deadline: On ``time.monotonic``'s clock.
    """
    entries: list[Json] = []
    if results is not None:
        results.add_peaks(asdict(bench.measured))
        results.add_peaks(asdict(bench.peaks))
    for slow in (False, True):
        for i, case in enumerate(chosen):
            if time.monotonic() > deadline:
                print(
                    f"time is up: {case.name} and later ones were not {'compared' if slow else 'timed'}",
                    file=sys.stderr,
                )
                break
            if slow and (i >= len(entries) or not any(p.slow and p.fits(case) for p in bench.peers)):
                continue
            if not slow:
                entries.append(bench.entry(case))
            bench.add_peers(entries[i], case, slow=slow)
            print(f"{case.name}: {'; '.join(row(entries[i])[1:])}", file=sys.stderr, flush=True)
            if results is not None:
                results.add_entry(entries[i])
                results.add_absent(bench.absent)
    return entries


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options that benchmarks share."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    parser.add_argument("--results", type=Path, help="result file, or 'auto' for bench/results/<gpu>/")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no more work after this long")


def open_results(given: Path | None, device: torch.device) -> Results | None:
    """The result file that was asked for."""
    if given is None:
        return None
    header = describe_machine(device)
    return Results(path_for(header) if str(given) == "auto" else given, header)


def default_backend(device: torch.device) -> str:
    """Kernels on a GPU or interpreted, else the reference: what the package itself runs there."""
    return "triton" if device.type == "cuda" or bootstrap.INTERPRETED else "reference"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a gate is red."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.partition("\n")[0])
    arguments(parser)
    parser.add_argument("--scope", help="tiny, small, main or full; by default main on a GPU, else small")
    parser.add_argument("--cases", default="", help="comma-separated words; cases whose name holds one of them")
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long each call is repeated")
    parser.add_argument("--no-peers", action="store_true")
    options: Any = parser.parse_args(argv)
    began, device = time.monotonic(), torch.device(options.device)
    peers, absent = split([] if options.no_peers else all_peers(), device)
    bench = Bench(device, default_backend(device), options.seconds, peers, absent)
    chosen = select(cases(options.scope or ("main" if device.type == "cuda" else "small")), options.cases)
    entries = run(bench, chosen, open_results(options.results, device), began + 60 * options.minutes)
    print(summary(bench, entries))
    return 0 if all(entry["verified"] for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
