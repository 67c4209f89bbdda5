"""Microbenchmarks of the ops: gate first, then time, peers of the same run, and the table.

    python -m bench.ops --scope main --cases attention      # see --help

A case whose gate is red gets no number, neither in the table nor in the results. Ours is timed before its peers and
after them, so that a chip that grew warm favours neither. After a CUDA error that nothing survives the command stops
with exit code 3; `--keep all` goes on with what is missing.
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

from bench import began, conditions, gates, roofline, specialized
from bench.cases import Case, cases, select
from bench.inputs import call, make, moved_bytes
from bench.lost import LOST, lost
from bench.ops_table import row, summary
from bench.peers import Inputs, Peer, all_peers, split
from bench.results import FOLDER, Json, Results, describe_machine, path_for
from bench.specialized import GLUON, STEM
from bench.timing import Stopwatch, Timing
from happyhorse_fast.ops.dispatch import CUDA_OPS, cuda_obstacle

SETS = 2
"""Sets of inputs that calls rotate through."""
# A peer that compiles is not started with less time left: one graph takes 10 to 40 s.
SLOW_SECONDS = 40.0
KEEP = ("none", "peers", "all")


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
        known: What the result file holds: ceilings and peers' times in it are not measured again.
        keep: Whether entries in it are not either: ``"all"``, else ``"peers"`` or ``"none"``.
    """

    device: torch.device
    backend: str
    seconds: float = 0.5
    peers: Sequence[Peer] = ()
    absent: dict[str, str] = field(default_factory=dict)
    also: Sequence[str] = ()
    known: Json = field(default_factory=dict)
    keep: str = "none"

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)
        self._peers_ms: dict[tuple[str, str, str, str], float | None] = {}
        self._timings: dict[tuple[str, str], Timing] = {}
        if self.keep == "none":
            self.known = {}
        measured = [roofline.Peaks(**peaks) for peaks in self.known.get("peaks", ()) if peaks["source"] == "measured"]
        self.measured = (
            measured[-1] if measured else roofline.measured(self.device, self.stopwatch, seconds=min(self.seconds, 0.3))
        )
        self.peaks = roofline.datasheet(self.device) or self.measured

    def kept(self, case: Case) -> dict[str, Json]:
        """Entries of a case that need not be timed again, by implementation; takes over the times of their peers."""
        entries = [entry for entry in self.known.get("entries", ()) if entry["case"] == case.name]
        for entry in entries:
            for name, taken in entry["peers"].items():
                self._peers_ms.setdefault((name, case.op, case.part, case.size.name), taken)
        for peer in self.peers:  # what broke would break again, and may have been what ended the process
            if f"{peer.name} on {case.name}" in self.known.get("absent", ()):
                self._peers_ms.setdefault((peer.name, case.op, case.part, case.size.name), None)
        return {entry["impl"]: entry for entry in entries} if self.keep == "all" else {}

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
                before = conditions.read(self.device)
                timing = self._timings[case.name, impl] = self.timing(case, impl)
                return timed(case, impl, timing, self.peaks) | conditions.around(before, self.device)
            except Exception as error:  # memory that ran out must not end the run
                problems = [f"{type(error).__name__}: {error}"]
        return red(case, impl, problems)

    def time_again(self, entry: Json, case: Case) -> None:
        """Pool an entry's times with those of now, after its peers: the chip has the same clocks on average."""
        key = case.name, entry["impl"]
        if key not in self._timings or not self.seconds:
            return
        first = self._timings.pop(key)
        try:
            again = self.timing(case, entry["impl"])
        except RuntimeError:  # memory that a peer kept: the first times stand
            return
        if first.clock == again.clock:
            pooled = timed(case, entry["impl"], Timing(first.times_ms + again.times_ms, first.clock), self.peaks)
            after = conditions.around(entry.get("conditions", {}).get("before", {}), self.device)
            entry |= pooled | after | {"peers": entry["peers"]}

    def add_peers(self, entries: Sequence[Json], case: Case, peers: Iterable[Peer]) -> bool:
        """Time those of the peers that fit into every verified entry of a case; whether any was timed now.

        A peer runs on the case's bf16 sibling, whatever the case's precision: what was timed for one serves the other.
        """
        verified = [entry for entry in entries if entry["verified"]]
        fitting = [peer for peer in peers if peer.fits(case)]
        if not verified or not fitting:
            return False
        inputs = [Inputs(case, self.device, seed) for seed in range(SETS)]
        timed_now = False
        for peer in fitting:
            key = (peer.name, case.op, case.part, case.size.name)
            if key not in self._peers_ms:
                self._peers_ms[key] = self._peer_ms(peer, case, inputs)
                timed_now = True
                if lost(self.device):
                    return False
            taken = self._peers_ms[key]
            if taken is not None:
                for entry in verified:
                    entry["peers"][peer.name] = taken
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return timed_now

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
    """What a case is timed with: the backend and the others, those that have a kernel for it."""
    able = {"cuda": case.op in CUDA_OPS[case.precision], GLUON: case.op == STEM}
    return [name for name in (backend, *also) if able.get(name, True)]


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


def run(bench: Bench, chosen: Sequence[Case], results: Results | None, deadline: float) -> list[Json]:
    """Time cases, ours and quick peers first, then one peer that compiles after the other; stops at the deadline.

    Args:
        bench: Where and how.
        chosen: Cases, most important first.
        results: Written after every entry, before its peers run.
        deadline: On ``time.monotonic``'s clock: no more work is started after it.
    """
    found: dict[Case, list[Json]] = {}
    compared: set[Case] = set()

    def write(entries: Iterable[Json]) -> None:
        for entry in entries:
            if entry["peers"] or case not in compared:
                print("; ".join(row(entry)), file=sys.stderr, flush=True)
            if results is not None:
                results.add_entry(entry)
        if results is not None:
            results.add_absent(bench.absent)

    if results is not None:
        results.add_peaks(asdict(bench.measured))
        results.add_peaks(asdict(bench.peaks))
    quick = [peer for peer in bench.peers if not peer.slow]
    work = [(case, quick) for case in chosen]
    work += [(case, [peer]) for peer in bench.peers if peer.slow for case in chosen if peer.fits(case)]
    for case, peers in work:
        if time.monotonic() > deadline - (SLOW_SECONDS if case in found and bench.device.type == "cuda" else 0):
            what = f"compared with {peers[0].name}" if case in found else "timed"
            print(f"time is up: {case.name} and later ones were not {what}", file=sys.stderr)
            break
        if case not in found:
            kept = bench.kept(case)
            found[case] = []
            for impl in implementations(case, bench.backend, bench.also):
                entry = kept.get(impl) or bench.entry(case, impl)
                reason = lost(bench.device)
                found[case].append(red(case, impl, [reason]) if reason and entry["verified"] else entry)
                write(found[case][-1:])
                if reason:
                    return _stopped(f"{case.name} {impl}", reason, found)
        compared.add(case)
        timed_now = bench.add_peers(found[case], case, peers)
        reason = lost(bench.device)
        if timed_now and peers is quick and not reason and time.monotonic() < deadline:
            for entry in found[case]:
                bench.time_again(entry, case)
        write(found[case])
        if reason:
            return _stopped(f"a peer on {case.name}", reason, found)
    return [entry for entries in found.values() for entry in entries]


def _stopped(after: str, reason: str, found: dict[Case, list[Json]]) -> list[Json]:
    print(f"STOPPED: the GPU of this process is lost after {after}: {reason}", file=sys.stderr, flush=True)
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
    obstacles = {GLUON: specialized.obstacle(device), "cuda": cuda_obstacle(device)}
    without = {name: reason for name, reason in obstacles.items() if reason}
    return [name for name in obstacles if name not in without], without


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a gate is red, 3 where the GPU is lost to this process."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.partition("\n")[0])
    arguments(parser)
    parser.add_argument("--scope", help="tiny, small, main, rest or full; by default main on a GPU, else small")
    parser.add_argument("--cases", default="", help="comma-separated words; cases whose name holds one of them")
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long each call is repeated")
    parser.add_argument("--impl", default="", help="comma-separated, of triton, gluon, cuda, reference; all by default")
    parser.add_argument("--peers", choices=("all", "quick", "slow", "none"), default="all", help="slow: they compile")
    keep = "of the result file: nothing, ceilings and peers' times, or entries as well"
    parser.add_argument("--keep", choices=KEEP, default="none", help=keep)
    options: Any = parser.parse_args(argv)
    deadline, device = began(argv) + 60 * options.minutes, torch.device(options.device)
    kinds = {"all": (False, True), "quick": (False,), "slow": (True,), "none": ()}[options.peers]
    peers, absent = split([peer for peer in all_peers() if peer.slow in kinds], device)
    also, without = other_backends(device)
    able = [default_backend(device), *also]
    impls = [impl for impl in able if not options.impl or impl in options.impl.split(",")]
    results = open_results(options.results, device)
    if not impls:
        reasons = {impl: without.get(impl, f"{', '.join(able)} run here") for impl in options.impl.split(",")}
        print("\n".join(f"not timed: {impl}: {reason}" for impl, reason in reasons.items()))
        return 0
    known = results.data if results is not None else {}
    bench = Bench(device, impls[0], options.seconds, peers, absent | without, impls[1:], known, options.keep)
    chosen = select(cases(options.scope or ("main" if device.type == "cuda" else "small")), options.cases)
    entries = run(bench, chosen, results, deadline)
    print(summary(bench.peaks, bench.measured, bench.absent, entries))
    if lost(device):
        return LOST
    return 0 if all(entry["verified"] for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
