"""The tables of ``verify``: recorded cases, kernels, equivalence, clips of the small model, calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from happyhorse_fast.cli import fidelity_tables
from happyhorse_fast.cli.output import Shown, literal, table, verdict
from happyhorse_fast.fast import calibration as formats
from happyhorse_fast.verify.equivalence import Distance, Equivalence, FormErrors
from happyhorse_fast.verify.layer_ops import OPS

if TYPE_CHECKING:
    from happyhorse_fast.fast.calibration import Calibration, OpCalibration
    from happyhorse_fast.ops.runtime.self_check import KernelCheck
    from happyhorse_fast.verify.checks import Comparison, Measurement

MODALITIES = ("video", "audio")
PLACES = {
    "sequence": "sequence",
    "worst layer": "layer",
    "video": "out.video",
    "audio": "out.audio",
    "sampler": "sampler",
}
"""Column -> what the names of its measurements begin with."""


def comparisons(found: list[Comparison]) -> Shown:
    """The worst error of every part of each case, what is past its budget, and a model's layers."""
    rows: list[list[Any]] = []
    for c in found:
        cells = [_worst(c, prefix, with_name=name == "worst layer") for name, prefix in PLACES.items()]
        budgets = [
            max((f"{m.budget:.0e}" for m in c.measurements if m.what.startswith(prefix)), key=float, default="")
            for prefix in ("out.", "sampler.")
        ]
        rows.append([c.name, *cells, *budgets, literal(("skipped", "yellow")) if c.skipped else verdict(c.passed)])
    columns = ["case", *PLACES, "model budget", "sampler budget", ""]
    # Those of a checkpoint's table that would be empty take the width of the names beside them.
    used = [i for i in range(len(columns)) if any(row[i] != "" for row in rows)]
    rows = [[row[i] for i in used] for row in rows]
    yield table("relative L2 error", [columns[i] for i in used], rows)
    for c in found:
        for m in c.measurements:
            if not m.passed:
                yield literal((f"{c.name}: {m.what} is off by {m.error:.2e}, budget {m.budget:.0e}", "red"))
        if c.skipped:
            yield literal((f"{c.name}: {c.skipped}", "yellow"))
        if any(m.cosine is not None for m in c.measurements):
            yield _by_layer(c)


def _worst(comparison: Comparison, prefix: str, with_name: bool) -> str:
    worst = comparison.worst(prefix)
    if worst is None:
        return ""
    return f"{worst.error:.1e}" + (f" ({worst.what})" if with_name else "")


def _by_layer(comparison: Comparison) -> Any:
    by_place: dict[str, list[Measurement]] = {}
    for m in comparison.measurements:
        by_place.setdefault(m.what.rpartition(".")[0], []).append(m)
    rows = [
        [place, *(f"{m.error:.2e}" for m in pair), *(f"{1 - (m.cosine or 0):.1e}" for m in pair)]
        for place, pair in by_place.items()
    ]
    return table(comparison.name, ["after", "video", "audio", "1 - cosine, video", "1 - cosine, audio"], rows)


def kernels(found: list[KernelCheck], device: str) -> Shown:
    """A row per kernel and format."""
    rows: list[list[Any]] = [[c.op, c.variant, c.detail, f"{c.seconds:.1f}", verdict(c.passed)] for c in found]
    title = f"kernels against their reference, on {device}"
    yield table(title, ["op", "format", "found", "s", ""], rows, left=2, folded=[2])
    if device == "cpu":
        yield "Run by Triton's interpreter, made exact: it shows what a kernel computes, not how a GPU rounds."


def fidelity(found: dict[str, Any]) -> Shown:
    """A row per policy of a Fidelity as plain data, and its violations."""
    yield table(fidelity_tables.title(found), fidelity_tables.COLUMNS, fidelity_tables.rows(found))
    yield fidelity_tables.NOTE
    yield from (literal((violation, "red")) for violation in found["violations"])


def equivalences(found: list[Equivalence]) -> Shown:
    """Every case: relative L2 and worst tile per op and layer, then all measures end to end."""
    for case in found:
        video, audio, text = case.tokens
        backends = sorted({backend for form in case.forms for backend in form.backends})
        yield literal(
            (case.case, "bold"),
            f": {case.layers} layers of {case.hidden_size}, {video:,} video + {audio:,} audio + {text:,} text "
            f"tokens, on {case.device}, fast forms on {', '.join(backends)}"
            f"{f'; sparsity {case.sparsity}' if case.sparsity else ''}",
        )
        yield _by_place(case, "relative L2 to float32", lambda d: f"{d.relative_l2:.2e}")
        yield _by_place(case, "worst 128x128 tile, 1 - 2<x,y>/(|x|^2+|y|^2)", lambda d: f"{d.tile_distance:.1e}")
        yield _end_to_end(case)
        for form in case.forms:
            yield from (literal((f"{form.form}: {violation}", "red")) for violation in form.violations)
    yield (
        "op: each on its float32 input, worst layer; layer: the residual stream after it, errors of all layers "
        "before included; added: distance to the form before, in units of float32's norm"
    )


def worst_op(form: FormErrors, op: str, modality: str) -> Distance:
    """An op's distance in the layer where it is largest."""
    errors = [e for what, e in form.errors.items() if what.startswith("op.") and what.endswith(f".{op}.{modality}")]
    return max(errors, key=lambda e: e.relative_l2)


def _by_place(case: Equivalence, title: str, cell: Callable[[Distance], str]) -> Any:
    columns = [f"{form.form}: {modality}" for form in case.forms for modality in MODALITIES]
    rows = []
    for op in OPS:
        cells = [cell(worst_op(form, op, modality)) for form in case.forms for modality in MODALITIES]
        rows.append([f"op {op}", *cells])
    for place in (f"layer.{i}" for i in range(case.layers)):
        cells = [cell(form.errors[f"{place}.{modality}"]) for form in case.forms for modality in MODALITIES]
        rows.append([place.replace(".", " "), *cells])
    return table(title, ["after", *columns], rows)


def _end_to_end(case: Equivalence) -> Any:
    rows = []
    for what in (what for what in case.forms[0].errors if what.startswith(("velocity", "latent"))):
        for form in case.forms:
            e = form.errors[what]
            psnr = "" if e.psnr_db is None else f"{e.psnr_db:.1f}"
            numbers = [f"{1 - e.cosine:.1e}", f"{e.tile_distance:.1e}", psnr]
            # No kernel has run then, only the places where one would round.
            step = "rounding" if form.step == "kernels" and form.backends == ("reference",) else form.step
            rows.append([what.replace(".", ", "), form.form, f"{e.relative_l2:.2e}", f"{e.own:.2e}", step, *numbers])
    columns = ["result", "form", "relative L2", "added", "lost to", "1 - cosine", "worst tile", "PSNR dB"]
    return table("end to end", columns, rows, left=2)


def calibration(found: Calibration, out: Path) -> Shown:
    """A row per op, then what to skip, what bf16 itself loses, and how the file is used."""
    columns = ["op", "bf16", "int8", "e4m3", "largest input", "largest/RMS", "saturated", "lost", "bound", "skip in"]
    title = (
        f"relative L2 to float32, worst of video, audio and text and of {found.clips} x {found.steps} steps; "
        "saturated and lost as e4m3 codes; bound: of scores, in powers of two"
    )
    yield table(title, columns, [_calibrated(of, found) for of in found.ops])
    for precision, rules in found.skip.items():
        yield f"skip in {precision} (past {found.most[precision]:g}): {', '.join(rules) or 'nothing'}"
    for of in found.coarse:
        line = f"{of.op} of layer {of.layer} is off by {of.worst('bf16'):.2e} in bf16, budget {found.most['bf16']:g}"
        yield literal((line, "red"))
    yield f"Written: {out}. FastConfig.calibrated({str(out)!r}, config, precision=...) takes it."


def _calibrated(of: OpCalibration, found: Calibration) -> list[str]:
    loudest = max(of.inputs.values(), key=lambda found: found.largest / max(found.rms, 1e-30))
    return [
        f"layer {of.layer} {of.op}",
        *(f"{of.worst(precision):.2e}" for precision in ("bf16", *formats.ATTENTION)),
        f"{loudest.largest:.3g}",
        f"{loudest.largest / max(loudest.rms, 1e-30):.1f}",
        f"{max(r.saturated for r in of.inputs.values()):.1e}",
        f"{max(r.lost for r in of.inputs.values()):.1e}",
        "" if of.bound is None else f"{of.bound:.1f}",
        ", ".join(precision for precision in formats.ATTENTION if not of.worst(precision) <= found.most[precision]),
    ]
