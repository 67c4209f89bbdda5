"""Targets on Hopper against the results: met, or missed by how much; the clip, the ops, predictions and outcomes.

python -m bench.targets                 # every GPU in bench/results
python -m bench.targets FILE.json       # one file; --markdown for docs/notes/
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import BLOCK_SPARSE, DROP_IN
from bench.inputs import BOUNDED, FOUND, RUNNING
from bench.measure.roofline import gpu_named
from bench.report.data import ceilings, form_of, gpu_results, measured_ceilings, share_of, steps_timed
from bench.report.predictions import PREDICTIONS, SIZE, Prediction
from bench.report.tables import gpu_tables
from bench.results import FOLDER, Json, comparable, read
from bench.sampler_runs import BASE, SECOND_STAGE, Run, chosen
from bench.table import Table

GOALS: tuple[tuple[str, str | None, dict[str, float]], ...] = (
    ("bf16", None, {"window": 530, "25%": 530}),
    ("fp8", None, {"window": 650, "25%": 650}),
    ("bf16", BOUNDED, {"dense": 700, "25%": 700, "window": 700}),
    ("int8_qk", BOUNDED, {"dense": 760, "25%": 840, "window": 780}),
    ("int8_qk_fp8_v", RUNNING, {"dense": 800, "25%": 780, "window": 770}),
    ("fp8", RUNNING, {"dense": 850}),
)
"""(precision, form of the softmax, TFLOP/s by mask) of attention; of no form are the goals of the first kernels, whose
outcomes are none of the second forms'."""
FINDING = 0.5
"""ms that finding the bound on the device may add to dense attention: 0.25 predicted, and twice that."""
PRODUCTS = ("fp8_linear_activation-swiglu7", "fp8_linear_residual-down", "qkv_linear", "fp8_linear_residual-proj")
MEMORY_BOUND = ("rmsnorm_quantize", "select_blocks-25%")
SCALED_MM, BF16_MM, INT_MM = (
    f"{name} (product only)" for name in ("torch._scaled_mm", "torch.mm bf16", "torch._int_mm")
)
_IN_FP8 = "8 steps, window, products in fp8, attention"
CLIPS = (
    ("8 steps, window, fp8", Run(BASE, "1080p", "fast fp8"), None, 32),
    ("8 steps, 25% of video pairs, fp8", Run(BASE, "1080p", "fast fp8", "25%"), None, 18),
    ("second stage, 5 steps, fp8", Run(SECOND_STAGE, "1080p", "fast fp8", steps=5), None, 18),
    (f"{_IN_FP8} bf16, bounded", Run(BASE, "1080p", "fast fp8 linear"), BOUNDED, 36),
    (f"{_IN_FP8} int8_qk, bounded", Run(BASE, "1080p", "fast fp8 int8_qk"), BOUNDED, 34),
    (f"{_IN_FP8} int8_qk_fp8_v", Run(BASE, "1080p", "fast fp8 int8_qk_fp8_v"), RUNNING, 35),
    ("8 steps, window, int8", Run(BASE, "1080p", "fast int8"), None, 36),
    *(
        (f"8 steps, {run.name}, as FLOPs predict", run, None, run.steps * run.step_seconds)
        for run in chosen("1080p-10s,1080p-15s,15b/540p/fast fp8,15b/256p/fast fp8")
    ),
)
"""Seconds of runs, of those that had a form of attention's softmax where one is named."""
CAPS = (80, 48, 24)
PEAK_GIB = {5: 18.5, 15: 21.8}
"""GiB that 8 bits take at most at 1080p, by seconds of the clip; 21.8 is what a card of 24 GB has."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Line:
    """A target and what was reached.

    Attributes:
        what: The target in words.
        wanted: At least, or at most, this.
        reached: None where it was not measured.
        unit: Of both.
        least: Whether more is better.
        note: What the number is of, or why there is none.
    """

    what: str
    wanted: float
    reached: float | None
    unit: str
    least: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        """In words, with the share that is missing."""
        if self.reached is None:
            return NOT_MEASURED
        if self.reached >= self.wanted if self.least else self.reached <= self.wanted:
            return "met"
        return f"missed by {abs(self.reached / self.wanted - 1):.1%}"

    def cells(self) -> tuple[str, ...]:
        """Cells of a table's row."""
        sign, reached = ">=" if self.least else "<=", "" if self.reached is None else f"{self.reached:.4g}"
        return self.what, f"{sign} {self.wanted:.4g} {self.unit}", reached, self.verdict, self.note


def lines(data: Json) -> Iterator[Line]:
    """Every target of one GPU's results."""
    for precision, softmax, goals in GOALS:
        for part, wanted in goals.items():
            form: dict[str, Any] = {"softmax": softmax} if softmax else {}
            entry, note = best(data, f"{BLOCK_SPARSE}-{part}", precision, **form)
            what = ", ".join(filter(None, (f"attention {part} {precision}", softmax, "computed blocks")))
            yield Line(what, wanted, entry["tflops"] if entry else None, "TFLOP/s", note=note)
    yield _finding(data)
    for kind in PRODUCTS:
        entry, note = best(data, kind, "fp8")
        yield Line(f"{kind} fp8 with its epilogue", 1083, entry["tflops"] if entry else None, "TFLOP/s", note=note)
        yield _against(data, kind, "fp8", "against torch._scaled_mm", SCALED_MM, 1.0)
    for kind, (precision, peer) in itertools.product(PRODUCTS, (("fp8", SCALED_MM), ("bf16", BF16_MM))):
        least = 0.98 if kind == PRODUCTS[0] else 0.95  # up adds to nothing in memory
        yield _against(data, kind, precision, "in turns with its bare product", peer, least, in_turns=True)
    for kind in PRODUCTS:
        yield _against(data, kind, "int8", "in turns with torch._int_mm", INT_MM, 1.0, in_turns=True)
    for precision, peer in (("bf16", BF16_MM), ("fp8", SCALED_MM)):
        yield _against(data, "qkv_linear", precision, "against its bare product", peer, 1 / 1.1)
    # The datasheet's, not a copy's: that is no ceiling, rmsnorm_quantize moves half as much again.
    peaks = next(iter(ceilings(data)), None)
    for kind in MEMORY_BOUND:
        for precision in ("fp8", "bf16"):
            entry, note = best(data, kind, precision)
            share = entry["gbps"] / 1e3 / peaks.bandwidth * 100 if entry and peaks else None
            of = f", of {peaks.bandwidth:.3g} TB/s ({peaks.source})" if share is not None and peaks else ""
            yield Line(f"{kind} {precision}, of peak bandwidth", 85, share, "%", note=f"{note}{of}")
    yield from _clip(data)


def _against(
    data: Json, kind: str, precision: str, how: str, peer: str, wanted: float, *, in_turns: bool = False
) -> Line:
    entry, _ = best(data, kind, precision, in_turns=in_turns)
    what, taken = f"{kind} {precision} {how}", entry["peers"].get(peer) if entry else None
    if not entry or not taken:
        return Line(what, wanted, None, "x its speed", note=f"{peer} was not timed" if entry else NOT_MEASURED)
    note = f"{peer} {taken:.4g} ms{'' if entry.get('span') else ', not interleaved'}"
    return Line(what, wanted, taken / entry["median_ms"], "x its speed", note=note)


def _finding(data: Json) -> Line:
    """Compare attention whose bound is found on the device with one that is known, by the kernel fastest there."""
    more, known = None, None
    found, note = best(data, f"{DROP_IN}-dense", "bf16", softmax=f"{BOUNDED}{FOUND}")
    if found:
        known, note = best(data, f"{BLOCK_SPARSE}-dense", "bf16", softmax=BOUNDED, impl=found["impl"])
    if found and known and comparable(found, known):
        more = found["median_ms"] - known["median_ms"]
        note = f"{found['impl']}, {found['median_ms']:.4g} ms beside {known['median_ms']:.4g}"
    elif known:
        note = "its times are of two spans"
    return Line("attention() dense bf16, more than with a known bound", FINDING, more, "ms", least=False, note=note)


def best(
    data: Json, kind: str, precision: str, *, in_turns: bool = False, **wanted: str | None
) -> tuple[Json | None, str]:
    """(the verified entry of a case of Hopper's kernel, else the fastest; which one it is or why there is none).

    Args:
        data: One GPU's results.
        kind: Op and part.
        precision: Of the case.
        in_turns: Whether an entry must have a span.
        **wanted: Fields that an entry must have (``impl``, ``softmax``); None: must not.
    """
    name = f"{kind}/{SIZE}/{precision}"
    of_case = [e for e in data["entries"] if e["case"] == name and (e.get("span") or not in_turns)]
    entries = [e for e in of_case if all(e.get(field) == x for field, x in wanted.items())]
    timed = [entry for entry in entries if entry["verified"] and entry["median_ms"] is not None]
    if not timed:
        return None, "; ".join(f"{e['impl']}: not verified: {e.get('reason', '')}" for e in entries) or NOT_MEASURED
    # What the launch table asks for, where it was timed: another kernel's time may be of another commit's span.
    timed = [entry for entry in timed if entry["impl"] == "hopper"] or timed
    fastest = min(timed, key=lambda entry: entry["median_ms"])
    reachable = share_of(fastest, measured_ceilings(data))
    also = f", {reachable:.0%} of the measured one" if reachable is not None else ""
    note = f"{fastest['impl']}, {fastest['median_ms']:.4g} ms, {fastest['roofline']:.0%} of the roofline{also}"
    return fastest, note


def _clip(data: Json) -> Iterator[Line]:
    for what, run, softmax, wanted in CLIPS:
        entry = _timed(data, run, softmax)
        note = "; ".join(filter(None, (form_of(entry), entry.get("note")))) if entry else NOT_MEASURED
        yield Line(what, wanted, entry["total_s"] if entry else None, "s", least=False, note=note)
    for precision in ("fp8", "int8"):
        entry = _timed(data, Run(BASE, "1080p", f"fast {precision}"))
        peak = entry["peak_memory_gib"] if entry else None
        yield Line(f"peak memory, {precision}", PEAK_GIB[5], peak, "GiB", least=False)
    for cap in CAPS:
        capped = [run for run in data["sampler"] if run["preset"] == BASE and run.get("cap_gb") == cap]
        done = [run for run in capped if run["s_per_step"] is not None]
        steps = max((steps_timed(run) for run in done), default=0) if capped else None
        note = "; ".join(f"{form_of(run)}: {run['note'] or 'whole'}" for run in capped)
        yield Line(f"whole steps as a {cap} GB card", 8, steps, "steps", note=note)
    for mode in ("eager", "torch.compile"):
        entry = _timed(data, Run(BASE, "1080p", mode)) or _timed(data, Run(BASE, "1080p", mode, cap_gb=CAPS[0]))
        ran = None if entry is None or entry["s_per_step"] is None else 1
        yield Line(f"{mode} beside it", 1, ran, "run", note=(entry or {}).get("note", ""))
    stages = {stage["name"]: stage for stage in data.get("stages", ())}
    for name in ("check", "tests", "sanitize"):
        stage = stages.get(name)
        passed, outcome = (int(stage["passed"]), stage["outcome"]) if stage else (None, "")
        yield Line(f"stage {name} green", 1, passed, "run", note=outcome)


def _timed(data: Json, run: Run, softmax: str | None = None) -> Json | None:
    """The fastest entry of a run's several backends; with a form of the softmax, of those that say they had it."""
    wanted = dataclasses.asdict(run) | ({"softmax": softmax} if softmax else {})
    found = [entry for entry in data["sampler"] if wanted.items() <= entry.items()]
    return min(found, key=lambda entry: entry["total_s"] or float("inf"), default=None)


def outcomes(title: str, data: Json, predictions: Iterable[Prediction]) -> Table:
    """Predictions beside what one GPU's results have of them."""
    columns = ("case", "on", "predicted ms", "bound by", "ms", "off by", "state")
    note = (
        "Predicted from the datasheet's peaks, an H100's for an H200; attention that names its softmax from a "
        "prototype's rates and the instructions of the compiled code, products in int8 and those that name what is new "
        "in them from bare products. Off by: the time over the nearer end of the prediction."
    )
    return Table(title, columns, tuple(predicted(data, predictions)), note)


def predicted(data: Json, predictions: Iterable[Prediction]) -> Iterator[tuple[str, ...]]:
    """Rows of predictions and outcomes; of a kernel with one form every outcome counts, whatever softmax it names."""
    twice = {(prediction.case, prediction.impl) for prediction in PREDICTIONS if prediction.softmax}
    for prediction in predictions:
        kind, _, precision = prediction.case.partition("/")
        form: dict[str, str | None] = {"impl": prediction.impl}
        form |= {"softmax": prediction.softmax} if (prediction.case, prediction.impl) in twice else {}
        entry, note = best(data, kind, precision, in_turns=bool(prediction.form), **form)
        low, high = prediction.ms
        expected = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        if entry is None:
            yield prediction.label, prediction.impl, expected, prediction.bound, "", "", note
            continue
        taken = entry["median_ms"]
        off = taken / (high if taken > high else low if taken < low else taken)
        clock = entry.get("conditions", {}).get("after", {})
        state = f"{clock['sm_mhz']:.0f} MHz, {clock['power_w']:.0f} W" if {"sm_mhz", "power_w"} <= clock.keys() else ""
        yield prediction.label, prediction.impl, expected, prediction.bound, f"{taken:.3g}", f"{off:.2f}x", state


def of_gpu(name: str) -> list[Prediction]:
    """Predictions for a GPU by the driver's name of it."""
    gpu = gpu_named(name)
    return [prediction for prediction in PREDICTIONS if gpu and gpu.name in prediction.gpus]


def tables(data: Json) -> list[Table]:
    """One GPU's targets, clip, ops, and predictions with their outcomes."""
    found = list(lines(data))
    verdicts = [line.verdict for line in found]
    counts = f"{verdicts.count('met')} of {len(found)} met, {verdicts.count(NOT_MEASURED)} not measured"
    where = f"{data['gpu']}, commit {data['commit']}"
    targets = ("target", "wanted", "reached", "verdict", "of")
    predictions = of_gpu(data["gpu"])
    return [
        Table(f"Targets, {where}: {counts}", targets, tuple(line.cells() for line in found)),
        *gpu_tables(data),
        *([outcomes(f"Predictions beside outcomes, {where}", data, predictions)] if predictions else []),
    ]


def text(data: Json, markdown: bool = False) -> str:
    """One GPU's tables."""
    return "\n\n".join(table.markdown() if markdown else table.text() for table in tables(data))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where there are no results."""
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="a result file, by default all of bench/results")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(argv)
    found = [read(options.file)] if options.file else list(gpu_results(FOLDER).values())
    if not found:
        print("no results of a GPU; `make gpu` makes them", file=sys.stderr)
        return 1
    print("\n\n".join(text(data, options.markdown) for data in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
