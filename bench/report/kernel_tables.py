"""Bytes, FLOPs, predictions and times of each kernel's cases, for the pages of docs/kernels."""

from __future__ import annotations

import itertools
from pathlib import Path

from bench.cases import BLOCK_SPARSE, cases
from bench.inputs import moved_bytes
from bench.report.data import KERNELS, Report
from bench.report.predictions import PREDICTIONS, Prediction
from bench.results import ROOT, Json
from bench.table import Table
from happyhorse_fast.costs import GPUS

OPS = {
    "attention": (BLOCK_SPARSE,),
    "qkv": ("rmsnorm_quantize", "qkv_linear"),
    "linear": ("fp8_linear_activation", "fp8_linear_residual"),
    "row_quantization": ("quantize_rows",),
    "block_selection": ("select_blocks",),
}
"""Page -> ops whose cases it shows."""
CARD = GPUS["h200"]
NOT_YET = "not measured"


def page(stem: str) -> Path:
    """Path of a kernel's page."""
    return ROOT / "docs" / "kernels" / f"{stem}.md"


def section(report: Report, stem: str) -> str:
    """The generated part of a kernel's page."""
    _, data = report.newest
    return f"{work(stem).markdown()}\n\n{times(stem, data).markdown()}"


def work(stem: str) -> Table:
    """List what each case computes and moves, and the least time of either."""
    rows = []
    for case in cases("main"):
        if case.op in OPS[stem]:
            flops, moved = case.computed_flops(), moved_bytes(case)
            products, memory = 1e3 * flops / CARD.rate(case.precision), moved / CARD.bandwidth / 1e9
            of_flops = (f"{flops / 1e12:.3g}", f"{flops / moved:,.0f}", f"{products:.3g}") if flops else ("", "", "")
            work, intensity, least = of_flops
            rows.append((case.kind, work, f"{moved / 1e9:.2f}", intensity, least, f"{memory:.2f}"))
    columns = ("case", "TFLOP", "GB", "FLOP per byte", "ms of products", "ms of memory")
    note = (
        "Whole tiles and blocks; every operand and result moved once, block maps left out. ms: at the peaks of "
        f"{CARD.source}; no kernel can be faster than the larger."
    )
    return Table("Work of a layer at 1080p and 5 s, 64,256 rows", columns, tuple(rows), note)


def times(stem: str, data: Json) -> Table:
    """Predictions and measurements of each case and kernel."""
    entries = {(entry["case"], entry["impl"]): entry for entry in data["entries"] if entry["verified"]}
    rows = []
    of_page = [case for case in cases("main") if case.op in OPS[stem]]
    for case, impl in itertools.product(of_page, ("hopper", "triton", "cuda")):
        expected, entry = newest(case.name, impl), entries.get((case.name, impl))
        if expected is None and entry is None:
            continue
        told, bound = ("", "") if expected is None else (in_words(expected), expected.bound)
        taken = NOT_YET if entry is None else f"{entry['median_ms']:.3g}"
        # What a prediction names as new was not in what was measured alone, without a span.
        older = expected is not None and entry is not None and is_newer(expected) and not entry.get("span")
        rows.append((case.kind, KERNELS[impl], told, bound, f"{taken}{', the form before' if older else ''}"))
    note = (
        f"Measured on one {data['gpu']} at commit {data['commit']}; predicted for the kernels as they are now. The "
        "form before: written anew since, by what that run showed, and not yet run."
    )
    return Table("Predicted and measured, ms", ("case", "on", "predicted", "bound by", "measured"), tuple(rows), note)


def in_words(prediction: Prediction) -> str:
    """Its milliseconds."""
    return " to ".join(dict.fromkeys(f"{ms:.3g}" for ms in prediction.ms))


def newest(case: str, impl: str) -> Prediction | None:
    """The prediction of a kernel as it is now: the last one of its case, on Hopper."""
    found = [p for p in PREDICTIONS if (p.name, p.impl) == (case, impl) and CARD.name in p.gpus]
    return found[-1] if found else None


def is_newer(prediction: Prediction) -> bool:
    """Tell whether it is of a second form."""
    return bool(prediction.softmax or prediction.form)
