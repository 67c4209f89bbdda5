"""Which ops run in CUDA rather than in Triton under backend "auto": only what committed results show to be faster.

``make report`` writes ``happyhorse_fast/ops/preferences.json`` from the newest result file of every architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from bench.results import Json
from happyhorse_fast.ops.dispatch import CUDA_OPS, PREFERENCES

Preferences = dict[str, dict[str, list[str]]]
"""{"90": {"fp8": [op, ...]}}."""


def preferences(files: Iterable[Json]) -> Preferences:
    """Ops that are faster in CUDA in every case that both implementations ran and passed their gates in.

    Args:
        files: Result files, oldest first; those of a CPU, or of no known architecture, do not count.
    """
    newest = {data["capability"]: data for data in files if data.get("capability")}
    found: Preferences = {}
    for capability, data in sorted(newest.items()):
        times: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for entry in data["entries"]:
            if entry["verified"] and entry["median_ms"] is not None:
                op, _, precision = entry["case"].split("/")
                of_op = times.setdefault((op.partition("-")[0], precision), {})
                of_op.setdefault(entry["case"], {})[entry["impl"]] = entry["median_ms"]
        for (op, precision), cases in sorted(times.items()):
            both = [ms for ms in cases.values() if {"triton", "cuda"} <= ms.keys()]
            if op in CUDA_OPS[precision] and both and all(ms["cuda"] < ms["triton"] for ms in both):
                found.setdefault(capability, {}).setdefault(precision, []).append(op)
    return found


def text(files: Iterable[Json]) -> str:
    """The file's content."""
    return json.dumps(preferences(files), indent=1) + "\n"


def write(files: Iterable[Json]) -> None:
    """Write it into the package."""
    PREFERENCES.write_text(text(files))
