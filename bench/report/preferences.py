"""Ops that run in CUDA rather than in Triton under backend "auto": only those that committed results show faster.

``make report`` writes ``ops/runtime/preferences.json`` from the result files of every architecture: of a case
that several hold the newest counts. Each kernel was timed by itself, and on an H200 the same kernel took up to 20 %
longer once the chip was warm, so a smaller difference may be the order of timing.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.results import Json
from happyhorse_fast.ops.runtime.formats import VARIANTS

LEAST_GAIN = 1.25
"""Times as fast as Triton's that a CUDA kernel must be in every case: more than the order of timing explains."""

Preferences = dict[str, dict[str, list[str]]]
"""{"90": {"fp8": [op, ...]}}, by architecture and the format of the cases."""


def preferences(gpus: Iterable[Json]) -> Preferences:
    """Ops that are faster by :data:`LEAST_GAIN` in CUDA in every case that both ran and passed their gates in.

    Args:
        gpus: All results of each GPU as one; those of no known architecture do not count.
    """
    # One GPU's Triton is not held against another's CUDA; what one of an architecture is slower with is not preferred.
    times: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, float]]] = {}
    for data in (data for data in gpus if data.get("capability")):
        for entry in data["entries"]:
            if entry["verified"] and entry["median_ms"] is not None:
                op, _, fmt = entry["case"].split("/")
                of_op = times.setdefault((data["capability"], fmt, op.partition("-")[0]), {})
                taken = of_op.setdefault((data["gpu"], entry["case"]), {})
                backend = "triton" if entry["impl"] == "hopper" else entry["impl"]  # which has two kernels of some ops
                taken[backend] = min(entry["median_ms"], taken.get(backend, float("inf")))
    found: Preferences = {}
    for (capability, fmt, op), cases in sorted(times.items()):
        both = [ms for ms in cases.values() if {"triton", "cuda"} <= ms.keys()]
        there = fmt in VARIANTS["cuda"].get(op, ())
        if there and both and all(ms["cuda"] * LEAST_GAIN <= ms["triton"] for ms in both):
            found.setdefault(capability, {}).setdefault(fmt, []).append(op)
    return found
