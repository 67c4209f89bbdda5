"""What `bench.commits` runs in another commit's sources: a module of its own, or its cases gated and timed on request.

Run by path, not as a module, so that a commit from before this file can be measured too. Everything else is imported
from that commit, which the path to import from begins with.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import functools
import runpy
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, cases
from bench.inputs import Given, call, make
from bench.measure import gates
from bench.measure.comparison import SETS
from bench.measure.conditions import Monitor
from bench.measure.timing import Prepared, Stopwatch

WARM_SECONDS = 0.3
"""Untimed, at the beginning of a turn: the clock is still the one before's."""


class Worker:
    """Answers questions about cases of one scope on a device; keeps the inputs of the case that was last asked for."""

    def __init__(self, device: torch.device, scope: str, monitor: Monitor) -> None:
        self.device, self.monitor = device, monitor
        self.cases = {case.name: case for case in cases(scope)}
        self.stopwatch = Stopwatch(device)
        self._prepared: dict[tuple[str, str], Prepared] = {}

    def gate(self, name: str, impl: str) -> list[str]:
        """List what is wrong with a case's result."""
        return gates.problems(self.cases[name], make(self.cases[name], self.device), impl)

    def time(self, name: str, impl: str, seconds: float) -> tuple[list[float], dict[str, Any]]:
        """(ms of each call, clock and power) of one turn; the first turn of a case makes its inputs."""
        if (name, impl) not in self._prepared:
            self._prepared.clear()  # the last case's inputs go first
            case: Case = self.cases[name]
            given: list[Given] = [make(case, self.device, seed) for seed in range(SETS)]
            calls = [functools.partial(call, case, one, impl) for one in given]
            self._prepared[name, impl] = self.stopwatch.prepare(calls, dry=not seconds)
        contestants = {name: self._prepared[name, impl]}
        span = self.stopwatch.interleave(contestants, seconds=seconds, warm=WARM_SECONDS if seconds else 0)
        return list(span.timings[name].times_ms), self.monitor.during(span.began, span.ended)


def serve(channel: Connection, device: torch.device, scope: str) -> None:
    """Answer (method, arguments) with (True, result), or (False, the error), until the other side is gone."""
    with Monitor(device) as monitor:
        worker = Worker(device, scope, monitor)
        while True:
            try:
                method, arguments = channel.recv()
            except EOFError:
                return
            try:
                answer = True, getattr(worker, method)(*arguments)
            except Exception as error:  # whatever a compiler or a driver raises is this commit's result
                answer = False, f"{type(error).__name__}: {str(error)[:200]}"
            channel.send(answer)


def main(arguments: list[str]) -> int:
    """Entry point: ``run``, a module and its options, or a connection's number, a device and a scope."""
    if arguments[0] == "run":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return 0
    serve(Connection(int(arguments[0])), torch.device(arguments[1]), arguments[2])
    return 0


if __name__ == "__main__":
    assert Path(sys.modules["happyhorse_fast.kernels"].__path__[0]) == bootstrap.ROOT / "kernels", "another's kernels"
    sys.exit(main(sys.argv[1:]))
