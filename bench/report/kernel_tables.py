"""Bytes, FLOPs, predictions and times of each kernel's cases, for the pages of docs/kernels."""

from __future__ import annotations

from bench import targets
from bench.cases import Case, cases
from bench.inputs import moved_bytes
from bench.report.data import Report
from bench.results import Json
from bench.table import Table
from happyhorse_fast.costs import GPUS
from happyhorse_fast.ops.runtime.dispatch import STEMS

CARD = GPUS["h200"]


def cases_of(stem: str) -> list[Case]:
    """The cases that a page shows: of the ops with this stem."""
    return [case for case in cases("main") if STEMS.get(case.op) == stem]


def section(report: Report, stem: str) -> str:
    """The generated part of a kernel's page."""
    _, data = report.newest
    return f"{work(stem).markdown()}\n\n{times(stem, data).markdown()}"


def work(stem: str) -> Table:
    """List what each case computes and moves, and the least time of either."""
    rows = []
    for case in cases_of(stem):
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
    """Predictions of the kernels as they are now, and their outcomes."""
    now = {(prediction.case, prediction.impl): prediction for prediction in targets.of_gpu(data["gpu"])}
    order = [case.name for case in cases_of(stem)]
    of_page = sorted((p for p in now.values() if p.name in order), key=lambda p: order.index(p.name))
    return targets.outcomes(f"Predicted and measured, {data['gpu']}, commit {data['commit']}", data, of_page)
