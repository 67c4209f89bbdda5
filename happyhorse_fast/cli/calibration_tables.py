"""The table of a calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from happyhorse_fast.cli.output import literal, table
from happyhorse_fast.model.calibration import ATTENTION, Calibration, OpCalibration

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

COLUMNS = ("op", "bf16", "int8", "e4m3", "largest input", "largest/RMS", "saturated", "lost", "skip in")


def render(console: Console, found: Calibration, out: Path) -> None:
    """Print a row per op, then what to skip, what bf16 itself loses, and how the file is used."""
    title = (
        f"relative L2 to float32, worst of video, audio and text and of {found.clips} x {found.steps} steps; "
        "saturated and lost as e4m3 codes"
    )
    console.print(table(title, COLUMNS, [_row(of, found) for of in found.ops]))
    for precision, rules in found.skip.items():
        console.print(f"skip in {precision} (past {found.most[precision]:g}): {', '.join(rules) or 'nothing'}")
    for of in found.coarse:
        line = f"{of.op} of layer {of.layer} is off by {of.worst('bf16'):.2e} in bf16, budget {found.most['bf16']:g}"
        console.print(literal((line, "red")))
    console.print(literal(f"Written: {out}. FastConfig.calibrated({str(out)!r}, config, precision=...) takes it."))


def _row(of: OpCalibration, found: Calibration) -> list[str]:
    loudest = max(of.inputs.values(), key=lambda found: found.largest / max(found.rms, 1e-30))
    return [
        f"layer {of.layer} {of.op}",
        *(f"{of.worst(precision):.2e}" for precision in ("bf16", *ATTENTION)),
        f"{loudest.largest:.3g}",
        f"{loudest.largest / max(loudest.rms, 1e-30):.1f}",
        f"{max(r.saturated for r in of.inputs.values()):.1e}",
        f"{max(r.lost for r in of.inputs.values()):.1e}",
        ", ".join(precision for precision in ATTENTION if not of.worst(precision) <= found.most[precision]),
    ]
