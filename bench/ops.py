"""Microbenchmarks of the ops: gate first, then time implementations and peers in turns, and the table.

    python -m bench.ops --scope main --cases attention      # see --help

A case whose gate is red gets no number, neither in the table nor in the results. Numbers of one line are of one span,
in which all took turns on a warm chip. After a CUDA error that nothing survives the command stops
with exit code 3; `--keep all` goes on with what is missing. `--gates` stops after the gates, so that kernels that never
ran take the GPU from a process of their own; `--keep gates` times what they left.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import LOST, began, hopper
from bench.cases import Case, cases, select
from bench.hopper import HOPPER
from bench.measure.comparison import SLOW_SECONDS, Bench, Stopped, groups
from bench.measure.conditions import Monitor
from bench.peers.registry import PEERS, split
from bench.report.tables import ops_table
from bench.results import FOLDER, Json, Results, describe_machine, path_for
from happyhorse_fast.ops.runtime.cuda.launch import cuda_obstacle
from happyhorse_fast.ops.runtime.obstacles import lost


def run(bench: Bench, chosen: Sequence[Case], deadline: float, *, gates: bool = False) -> list[Json]:
    """Compare cases with quick peers first, then with those that compile as well; stops at the deadline.

    Args:
        bench: Where and how.
        chosen: Cases, most important first.
        deadline: On ``time.monotonic``'s clock: no more work is started after it.
        gates: Hold cases against their gates, and time nothing.

    Returns:
        Entries that are written, or were kept; after gates alone those of red ones.
    """
    for peaks in () if gates else (bench.measured, bench.peaks):
        print(json.dumps(asdict(peaks)), file=sys.stderr, flush=True)
        bench.results.add("peaks", asdict(peaks))
    quick = [peer for peer in bench.peers if not peer.slow]
    passes = [quick] if gates or len(quick) == len(bench.peers) else [quick, bench.peers]
    for peers, group in itertools.product(passes, groups(chosen)):
        slow = [peer for peer in peers if peer.slow]
        if not bench.ours(group) or (slow and not any(peer.fits(case) for peer in slow for case in group)):
            continue
        if time.monotonic() > deadline - (SLOW_SECONDS if slow and bench.device.type == "cuda" else 0):
            what = "gated" if gates else "compared with peers that compile" if slow else "timed"
            print(f"time is up: {group[0].name} and later ones were not {what}", file=sys.stderr)
            bench.cut = True
            break
        if not gates and bench.done(group, peers):
            continue
        try:
            if gates:
                green = ", ".join(f"{case.name} {impl}" for case, impl in bench.green(group))
                print(f"green: {green or 'none'}", flush=True)
            else:
                bench.compare(group, peers, deadline)
        except Stopped as stopped:
            print(f"STOPPED: the GPU of this process is lost: {stopped}", file=sys.stderr, flush=True)
            break
    return list(bench.found.values())


def summary(bench: Bench) -> str:
    """The table of entries, and what is absent."""
    peaks = [asdict(bench.peaks), asdict(bench.measured)]
    table = ops_table(bench.results.data | {"peaks": peaks, "entries": list(bench.found.values())}, whole=True)
    absent = (f"absent: {name}: {reason}" for name, reason in sorted(bench.results.data["absent"].items()))
    return "\n".join([table.text(), *absent])


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options that benchmarks share."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    parser.add_argument("--results", type=Path, help="result file, or the folder it goes into; 'auto': bench/results")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no more work after this long")


def open_results(given: Path | None, device: torch.device) -> Results:
    """The result file that was asked for, or what is kept in memory alone."""
    header = describe_machine(device)
    if given is not None and given.suffix != ".json":
        given = path_for(header, FOLDER if str(given) == "auto" else given)
    return Results(given, header)


def default_backend(device: torch.device) -> str:
    """Kernels on a GPU or interpreted, else the reference: what the package itself runs there."""
    return "triton" if device.type == "cuda" or bootstrap.INTERPRETED else "reference"


def other_backends(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """(implementations beside the default one that can run here, reasons of those that cannot)."""
    obstacles = {HOPPER: hopper.obstacle(device), "cuda": cuda_obstacle(device)}
    without = {name: reason for name, reason in obstacles.items() if reason}
    return [name for name in obstacles if name not in without], without


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a gate is red or, of gates alone, not reached; 3 where the GPU is lost."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.partition("\n")[0])
    arguments(parser)
    parser.add_argument("--scope", help="tiny, small, main, rest or full; by default main on a GPU, else small")
    parser.add_argument("--cases", default="", help="comma-separated words; cases whose name holds one of them")
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long each contestant of a span runs")
    parser.add_argument(
        "--impl", default="", help="comma-separated, of triton, hopper, cuda, reference; all by default"
    )
    parser.add_argument("--peers", choices=("all", "quick", "none"), default="all", help="quick: none that compiles")
    keep = "of the result file: nothing, gates' verdicts, or what was timed as well"
    parser.add_argument("--keep", choices=("none", "gates", "all"), default="none", help=keep)
    parser.add_argument("--gates", action="store_true", help="hold every case against its gate, and time nothing")
    options: Any = parser.parse_args(argv)
    deadline, device = began(argv) + 60 * options.minutes, torch.device(options.device)
    wanted = [peer for peer in PEERS if options.peers == "all" or (options.peers == "quick" and not peer.slow)]
    peers, absent = split(wanted, device)
    also, without = other_backends(device)
    able = [default_backend(device), *also]
    impls = [impl for impl in able if not options.impl or impl in options.impl.split(",")]
    results = open_results(options.results, device)
    if not impls:
        reasons = {impl: without.get(impl, f"{', '.join(able)} run here") for impl in options.impl.split(",")}
        print("\n".join(f"not timed: {impl}: {reason}" for impl, reason in reasons.items()))
        return 0
    results.add_absent(absent | without)
    chosen = select(cases(options.scope or ("main" if device.type == "cuda" else "small")), options.cases)
    with Monitor(device) as monitor:
        bench = Bench(device, impls[0], options.seconds, peers, impls[1:], results, options.keep, monitor)
        entries = run(bench, chosen, deadline, gates=options.gates)
    if not options.gates:
        print(summary(bench))
    if lost(device):
        return LOST
    # Kernels without a verdict would be left out of what is timed next, and nothing else would say so.
    return 0 if all(entry["verified"] for entry in entries) and not (options.gates and bench.cut) else 1


if __name__ == "__main__":
    sys.exit(main())
