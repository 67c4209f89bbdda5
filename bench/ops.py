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

from bench import began, gates, roofline
from bench.cases import Case, cases, select
from bench.inputs import call, make, moved_bytes
from bench.peers import Inputs, Peer, all_peers, split
from bench.results import FOLDER, Json, Results, describe_machine, path_for
from bench.timing import Stopwatch, Timing
from happyhorse_fast.ops.dispatch import CUDA_OPS, cuda_obstacle

SETS = 2
"""Sets of inputs that calls rotate through."""
COLUMNS = ("case", "impl", "ms", "spread", "TFLOP/s", "useful", "GB/s", "roofline", "peers: their time over ours")


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
        also: Other implementations, each timed on the cases that it has a kernel for.
    """

    device: torch.device
    backend: str
    seconds: float = 0.5
    peers: Sequence[Peer] = ()
    absent: dict[str, str] = field(default_factory=dict)
    also: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)
        self.measured = roofline.measured(self.device, self.stopwatch, seconds=min(self.seconds, 0.3))
        self.peaks = roofline.datasheet(self.device) or self.measured
        self._peers_ms: dict[tuple[str, str, str, str], float | None] = {}

    def gate(self, case: Case, impl: str | None = None) -> list[str]:
        """What is wrong with an implementation on this case; an error it raises is."""
        try:
            return gates.problems(case, make(case, self.device), impl or self.backend)
        except Exception as error:  # whatever a compiler or driver raises
            return [f"{type(error).__name__}: {error}"]

    def timing(self, case: Case, impl: str | None = None) -> Timing:
        """Time an implementation that passed its gate."""
        sets = (make(case, self.device, seed) for seed in range(SETS))
        calls = [functools.partial(call, case, given, impl or self.backend) for given in sets]
        return self.stopwatch.time(calls, seconds=self.seconds)

    def entry(self, case: Case, impl: str | None = None) -> Json:
        """A case's result, without peers."""
        impl = impl or self.backend
        problems = self.gate(case, impl)
        if not problems:
            try:
                return timed(case, impl, self.timing(case, impl), self.peaks)
            except Exception as error:  # memory that ran out must not end the run
                problems = [f"{type(error).__name__}: {error}"]
        return red(case, impl, problems)

    def add_peers(self, entries: Sequence[Json], case: Case, peers: Iterable[Peer]) -> None:
        """Time those of the peers that fit into every verified entry of a case.

        A peer runs on the case's bf16 sibling, whatever the case's precision: what was timed for one serves the other.
        """
        verified = [entry for entry in entries if entry["verified"]]
        fitting = [peer for peer in peers if peer.fits(case)]
        if not verified or not fitting:
            return
        inputs = [Inputs(case, self.device, seed) for seed in range(SETS)]
        for peer in fitting:
            key = (peer.name, case.op, case.part, case.size.name)
            if key not in self._peers_ms:
                self._peers_ms[key] = self._peer_ms(peer, case, inputs)
            taken = self._peers_ms[key]
            if taken is not None:
                for entry in verified:
                    entry["peers"][peer.name] = taken
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _peer_ms(self, peer: Peer, case: Case, inputs: Sequence[Inputs]) -> float | None:
        """Median of a peer; None where it does not run, which is then absent with its reason."""
        try:
            # One set where preparing compiles; the flush empties the cache for either.
            calls = [peer.prepare(case, given) for given in inputs[: 1 if peer.slow else SETS]]
            return self.stopwatch.time(calls, seconds=self.seconds).median_ms
        except LookupError as error:
            self.absent[f"{peer.name} on {case.op}{'-' if case.part else ''}{case.part}"] = str(error)
        except Exception as error:  # a peer that breaks must not end the run
            self.absent[f"{peer.name} on {case.name}"] = f"{type(error).__name__}: {str(error)[:200]}"
        return None


def implementations(case: Case, backend: str, also: Sequence[str]) -> list[str]:
    """What a case is timed with: the backend, and those others that have a kernel for it."""
    return [backend, *(name for name in also if name != "cuda" or case.op in CUDA_OPS[case.precision])]


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
        "clock": timing.clock,
    }


def row(entry: Json) -> list[str]:
    """A line of the table; a red case has its reason in place of numbers."""
    if not entry["verified"]:
        return [entry["case"], entry["impl"], *"------", f"NOT VERIFIED: {entry['reason']}"]
    ours = entry["median_ms"]
    spread = (entry["high_ms"] - entry["low_ms"]) / ours
    peers = ", ".join(f"{name} {taken / ours:.2f}x" for name, taken in entry["peers"].items())
    flops = [f"{entry[k]:.3g}" if entry["tflops"] else "" for k in ("tflops", "tflops_useful")]
    return [
        entry["case"],
        entry["impl"],
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
            [
                *(x.ljust(w) for x, w in zip(line[:2], widths[:2], strict=True)),
                *(x.rjust(w) for x, w in zip(line[2:-1], widths[2:], strict=True)),
                line[-1],
            ]
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
    """Time cases, ours and quick peers first, then one peer that compiles after the other; stops at the deadline.

    Args:
        bench: Where and how.
        chosen: Cases, most important first.
        results: Written after every entry.
        deadline: On ``time.monotonic``'s clock: no more work is started after it.
    """
    found: dict[Case, list[Json]] = {}
    if results is not None:
        results.add_peaks(asdict(bench.measured))
        results.add_peaks(asdict(bench.peaks))
    quick = [peer for peer in bench.peers if not peer.slow]
    work = [(case, quick) for case in chosen]
    work += [(case, [peer]) for peer in bench.peers if peer.slow for case in chosen if peer.fits(case)]
    for case, peers in work:
        if time.monotonic() > deadline:
            what = f"compared with {peers[0].name}" if case in found else "timed"
            print(f"time is up: {case.name} and later ones were not {what}", file=sys.stderr)
            break
        if case not in found:
            found[case] = [bench.entry(case, impl) for impl in implementations(case, bench.backend, bench.also)]
        bench.add_peers(found[case], case, peers)
        for entry in found[case]:
            print("; ".join(row(entry)), file=sys.stderr, flush=True)
            if results is not None:
                results.add_entry(entry)
        if results is not None:
            results.add_absent(bench.absent)
    return [entry for entries in found.values() for entry in entries]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options that benchmarks share."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    parser.add_argument("--results", type=Path, help="result file, or the folder it goes into; 'auto': bench/results")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no more work after this long")


def open_results(given: Path | None, device: torch.device) -> Results | None:
    """The result file that was asked for."""
    if given is None:
        return None
    header = describe_machine(device)
    if str(given) == "auto":
        given = FOLDER
    return Results(given if given.suffix == ".json" else path_for(header, given), header)


def default_backend(device: torch.device) -> str:
    """Kernels on a GPU or interpreted, else the reference: what the package itself runs there."""
    return "triton" if device.type == "cuda" or bootstrap.INTERPRETED else "reference"


def other_backends(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """(implementations beside the default one that can run here, reasons of those that cannot)."""
    obstacle = cuda_obstacle(device)
    return ([], {"cuda": obstacle}) if obstacle else (["cuda"], {})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a gate is red."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.partition("\n")[0])
    arguments(parser)
    parser.add_argument("--scope", help="tiny, small, main, rest or full; by default main on a GPU, else small")
    parser.add_argument("--cases", default="", help="comma-separated words; cases whose name holds one of them")
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long each call is repeated")
    parser.add_argument("--no-peers", action="store_true")
    options: Any = parser.parse_args(argv)
    device = torch.device(options.device)
    peers, absent = split([] if options.no_peers else all_peers(), device)
    also, without = other_backends(device)
    bench = Bench(device, default_backend(device), options.seconds, peers, absent | without, also)
    chosen = select(cases(options.scope or ("main" if device.type == "cuda" else "small")), options.cases)
    entries = run(bench, chosen, open_results(options.results, device), began(argv) + 60 * options.minutes)
    print(summary(bench, entries))
    return 0 if all(entry["verified"] for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
