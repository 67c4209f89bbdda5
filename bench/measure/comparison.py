"""One op against its peers: implementations whose gate is green and peers take turns in one span.

A comparison is of one op, part and size in all chosen precisions, since peers run in bf16 whatever the precision. An
entry's time and its peers' are always of one span (`timing.Span`); a span replaces the entry of the one
before, and what was not timed in it is not in it.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases import BLOCK_SPARSE, DROP_IN, Case
from bench.hopper import HOPPER, fits
from bench.inputs import Given, call, make, moved_bytes, softmax
from bench.measure import gates, roofline
from bench.measure.conditions import Monitor
from bench.measure.timing import Failed, Prepared, Stopwatch, Timing
from bench.peers.registry import Peer, bf16_inputs
from bench.results import ENTRY_NUMBERS, Json, Results
from happyhorse_fast.ops.runtime.formats import VARIANTS
from happyhorse_fast.ops.runtime.obstacles import lost

SETS = 2
"""Sets of inputs that calls rotate through."""
# A peer that compiles is not started with less time left: one graph takes 10 to 40 s.
SLOW_SECONDS = 40.0

Group = tuple[Case, ...]
"""Cases of one op (attention's two ways in count as one), part and size."""
Ours = tuple[Case, str]
"""A case and its implementation."""


class Stopped(Exception):
    """The GPU is lost to this process; the message says in what."""


@dataclass
class Bench:
    """Compares cases on a device.

    Attributes:
        device: Where they run.
        backend: Implementation of the ops.
        seconds: About how long each contestant of a span runs; on a GPU a span is a second at least.
        peers: Those that can run here.
        also: Other implementations, each timed on the cases that it has a kernel for.
        results: What is found, reasons of peers that cannot do something included, and what was found before.
        keep: What is taken over of that: nothing, ``"none"``; ceilings and gates, ``"gates"``; or with them the
            comparisons, ``"all"``.
        monitor: Samples the GPU's state.
        found: Entries that were written or kept, by case and implementation.
        cut: Whether time was up before every case was reached.
    """

    device: torch.device
    backend: str
    seconds: float = 0.5
    peers: Sequence[Peer] = ()
    also: Sequence[str] = ()
    results: Results = field(default_factory=lambda: Results(None, {}))
    keep: str = "none"
    monitor: Monitor | None = None
    found: dict[tuple[str, str], Json] = field(default_factory=dict)
    cut: bool = False

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)
        known = {} if self.keep == "none" else self.results.data
        self._peaks = [peaks for peaks in known.get("peaks", ()) if peaks["source"] == roofline.MEASURED]
        self._entries = {(entry["case"], entry["impl"]): entry for entry in known.get("entries", ())}
        self._softmax: dict[Case, str | None] = {}
        self._gates = {(gate["case"], gate["impl"]): gate["passed"] for gate in known.get("gates", ())}

    @functools.cached_property
    def measured(self) -> roofline.Peaks:
        """Ceilings of this machine, warm."""
        if self._peaks:
            return roofline.Peaks(**self._peaks[-1])
        return roofline.measured(self.stopwatch, seconds=self.seconds, monitor=self.monitor)

    @functools.cached_property
    def peaks(self) -> roofline.Peaks:
        """Ceilings that the roofline is of: the datasheet's, or measured ones for a device without."""
        gpu = roofline.gpu_named(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return roofline.Peaks(gpu.bandwidth, gpu.bf16, gpu.fp8, gpu.source, int8=gpu.int8) if gpu else self.measured

    def ours(self, group: Group) -> list[Ours]:
        """Every implementation of every case of a group.

        One besides ``backend`` whose gate another process should have held, and was perhaps cut in, is not among them:
        what hung there would hang here, and leave the others without a number.
        """
        every = [(case, impl) for case in group for impl in implementations(case, self.backend, self.also)]
        alone = self.keep == "none"
        return [(c, impl) for c, impl in every if alone or impl == self.backend or (c.name, impl) in self._gates]

    def done(self, group: Group, peers: Iterable[Peer]) -> bool:
        """Whether all of a group was found before, with these peers; then it is kept."""
        if self.keep != "all":
            return False
        kept, fitting = {}, self._fitting(group, peers)
        for case, impl in self.ours(group):
            entry = kept[case.name, impl] = self._entries.get((case.name, impl), {})
            wanted = {peer.name for peer in fitting if peer.fits(case)}
            whole = entry.get("median_ms") is not None and entry.get("span") and wanted <= entry["peers"].keys()
            if not entry or (entry["verified"] and not whole):
                return False
        self.found |= kept
        return True

    def gate(self, case: Case, impl: str) -> list[str]:
        """List what is wrong with an implementation on this case; an error that it raises is."""
        try:
            return gates.problems(case, make(case, self.device), impl)
        except Exception as error:  # whatever a compiler or driver raises
            return [f"{type(error).__name__}: {error}"]

    def green(self, group: Group) -> list[Ours]:
        """Implementations that may be timed; entries of those that may not are written.

        Raises:
            Stopped: One took the GPU from this process.
        """
        found = []
        for case, impl in self.ours(group):
            known = self._gates.get((case.name, impl))
            if known is not None:
                found += [(case, impl)] if known else []
                continue
            problems = self.gate(case, impl)
            reason = lost(self.device)
            if problems or reason:
                self._red(case, impl, [reason] if reason and not problems else problems)
            else:
                found.append((case, impl))
                self._verdict(case, impl, True)
            if reason:
                raise Stopped(f"{case.name} {impl}: {reason}")
        return found

    def compare(self, group: Group, peers: Sequence[Peer], deadline: float = float("inf")) -> dict[Ours, Timing]:
        """Gate what is not gated, time what is green and the peers that fit in one span, and write the entries.

        Args:
            group: What is compared.
            peers: With whom; what they cannot do, or what breaks, is then absent in the results.
            deadline: On ``time.monotonic``'s clock: what cannot end before is left out.

        Returns:
            Times of the implementations that were timed.

        Raises:
            Stopped: A contestant took the GPU from this process. The results say which it was; where that
                cannot be told it is held against the peers, and without any against the implementations.
        """
        ready = dict(self._prepared(self.green(group)))
        if not ready:
            return {}
        fitting = {peer.name: peer for peer in self._fitting(group, peers)}
        slow = {name for name, peer in fitting.items() if peer.slow}
        beside = dict(self._prepared_peers(group, fitting.values(), deadline))
        if slow and not slow & beside.keys():
            return {}  # nothing that the span before did not have
        least = self.stopwatch.least_seconds
        for name, _ in sorted(beside.items(), key=lambda item: -least(item[1])):
            needs, left = sum(map(least, (*ready.values(), *beside.values()))), deadline - time.monotonic()
            if needs > left:
                self._absent(name, group[0].name, f"turns with it need {needs:.0f} s, {max(left, 0):.0f} were left")
                del beside[name]
        while ready:
            names = ", ".join([*(f"{case.name} {impl}" for case, impl in ready), *beside])
            try:
                span = self.stopwatch.compare({**ready, **beside}, self.seconds)
                reason = lost(self.device)
                failed = Failed("", RuntimeError(reason)) if reason else None
            except Failed as error:
                reason, failed = lost(self.device), error
            except Exception as error:  # what a call that had begun raises at the end of the rounds
                reason, failed = lost(self.device) or str(error), Failed("", error)
            if failed is None:
                break
            self._blame(group, failed, ready, beside)
            if reason:
                raise Stopped(f"{names} took turns: {reason}")
        else:
            return {}
        state = self.monitor.during(span.began, span.ended) if self.monitor else {}
        found = {ours: span.timings[ours] for ours in ready}
        for (case, impl), taken in found.items():
            times = {n: span.timings[n].median_ms for n in beside if fitting[n].fits(case)}
            entry = timed(case, impl, taken, self.peaks) | {"peers": times, "span": span.name} | state
            form = self._softmax[case]
            self._write(entry | ({"softmax": form} if form else {}))
        del ready, beside
        torch.cuda.empty_cache()
        return found

    def _fitting(self, group: Group, peers: Iterable[Peer]) -> list[Peer]:
        """Peers that do some of a group's work; what broke in the result file would break again."""
        broken = self.results.data["absent"] if self.keep == "all" else {}
        found = []
        for peer in peers:
            places = [case.name for case in group if peer.fits(case)]
            if places and not {f"{peer.name} on {place}" for place in (*places, group[0].use)} & broken.keys():
                found.append(peer)
        return found

    def _prepared(self, green: Iterable[Ours]) -> Iterator[tuple[Ours, Prepared]]:
        """Implementations that ran; those of a case share its inputs."""
        sets: dict[Case, list[Given]] = {}
        for case, impl in green:
            try:
                if case not in sets:
                    sets[case] = [make(case, self.device, seed) for seed in range(SETS)]
                    self._softmax[case] = softmax(sets[case][0])
                calls = [functools.partial(call, case, given, impl) for given in sets[case]]
                yield (case, impl), self.stopwatch.prepare(calls, dry=not self.seconds)
            except Exception as error:  # memory that ran out must not end the run
                self._red(case, impl, [f"{type(error).__name__}: {error}"])
            if reason := lost(self.device):
                raise Stopped(f"{case.name} {impl}: {reason}")

    def _prepared_peers(self, group: Group, peers: Iterable[Peer], deadline: float) -> Iterator[tuple[str, Prepared]]:
        inputs: list[Given] = []
        for peer in peers:
            if time.monotonic() > deadline - (SLOW_SECONDS if peer.slow and self.device.type == "cuda" else 0):
                continue
            case = next(case for case in group if peer.fits(case))
            try:
                inputs = inputs or [bf16_inputs(case, self.device, seed) for seed in range(SETS)]
                # One set where preparing compiles; the flush empties the cache for either.
                calls = [peer.prepare(case, given) for given in inputs[: 1 if peer.slow else SETS]]
                yield peer.name, self.stopwatch.prepare(calls, dry=not self.seconds)
            except LookupError as error:
                self._absent(peer.name, case.use, str(error))
            except Exception as error:  # a peer that breaks must not end the run
                self._absent(peer.name, case.name, f"{type(error).__name__}: {str(error)[:200]}")
            if reason := lost(self.device):
                if f"{peer.name} on {case.name}" not in self.results.data["absent"]:
                    self._absent(peer.name, case.name, reason)
                raise Stopped(f"{peer.name} on {case.name}: {reason}")

    def _blame(self, group: Group, failed: Failed, ready: dict[Ours, Prepared], beside: dict[str, Prepared]) -> None:
        """Take out who failed; where that cannot be told all peers, and without peers all implementations."""
        guilty: list[Any] = [failed.contestant] if failed.contestant else list(beside or ready)
        for name in guilty:
            if name in ready:
                del ready[name]
                case, impl = name
                self._red(case, impl, [str(failed)])
            else:
                del beside[name]
                self._absent(name, group[0].name, str(failed)[:200])

    def _red(self, case: Case, impl: str, problems: Sequence[str]) -> None:
        """Give a case that must not have a number its entry."""
        self._verdict(case, impl, False)
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        why = {"peers": {}, "verified": False, "reason": problems[0] + more}
        self._write({"case": case.name, "impl": impl, **dict.fromkeys(ENTRY_NUMBERS), **why})

    def _verdict(self, case: Case, impl: str, passed: bool) -> None:
        self._gates[case.name, impl] = passed
        self.results.add("gates", {"case": case.name, "impl": impl, "passed": passed})

    def _write(self, entry: Json) -> None:
        print(json.dumps(entry), file=sys.stderr, flush=True)
        self.found[entry["case"], entry["impl"]] = entry
        self.results.add("entries", entry)

    def _absent(self, peer: str, where: str, why: str) -> None:
        self.results.add_absent({f"{peer} on {where}": why})


def groups(chosen: Iterable[Case]) -> list[Group]:
    """Cases by what is compared, each group at the place of its first; both ways into attention are one."""
    found: dict[tuple[str, str, str], list[Case]] = {}
    for case in chosen:
        found.setdefault((BLOCK_SPARSE if case.op == DROP_IN else case.op, case.part, case.size.name), []).append(case)
    return [tuple(cases) for cases in found.values()]


def implementations(case: Case, backend: str, also: Sequence[str]) -> list[str]:
    """Name what a case is timed with: the backend and the others, those that have a kernel for it."""
    able = {
        "cuda": case.variant in VARIANTS["cuda"].get(case.op, ()),
        HOPPER: fits(case),
    }
    return [name for name in (backend, *also) if able.get(name, True)]


def timed(case: Case, impl: str, timing: Timing, peaks: roofline.Peaks) -> Json:
    """The entry of a case that passed its gate, without peers and span."""
    tflops, gbps = case.computed_flops() / timing.median_ms / 1e9, moved_bytes(case) / timing.median_ms / 1e6
    return {
        "case": case.name,
        "impl": impl,
        "median_ms": timing.median_ms,
        "tflops": tflops,
        "gbps": gbps,
        "roofline": peaks.share(tflops, gbps, case.precision),
        "verified": True,
        "tflops_useful": case.useful_flops() / timing.median_ms / 1e9,
        "low_ms": timing.low_ms,
        "high_ms": timing.high_ms,
        "clock": timing.clock,
    }
