"""The picture of the clip: seconds of its denoising by form, split by op."""

from __future__ import annotations

import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.report.data import Report, clips, form_of, parts_of, steps_timed, total_of
from bench.report.style import BLUE, FAINT, GREEN, GREY, INK, ORANGE, TEAL, VIOLET, blank_figure, clean
from bench.results import Json
from bench.sampler_runs import PUBLISHED_SECONDS, SECOND_STAGE

COLOURS = {
    "attention": ORANGE,
    "selection": "#e8a33d",
    "proj + down": VIOLET,
    "up": GREEN,
    "QKV": BLUE,
    "norms": TEAL,
    "row codes": "#66a9b5",
    "eager's products": GREY,
    "rest": "#ced4da",
}
NOT_SPLIT, UNKNOWN = "not split by op", "#adb5bd"


def clip(report: Report) -> Figure:
    """Whole clips with solid bars, those extrapolated from fewer steps hatched; the newest GPU's."""
    _, data = report.newest
    shown = ("1080p", PUBLISHED_SECONDS)
    runs = [run for run in clips(data) if run["total_s"] and (run["resolution"], run["seconds"]) == shown]
    note = (
        f"wall time of denoising alone, commit {data['commit']}, 15B model, random weights. Hatched, ~: extrapolated "
        "from the median of the first steps. A bar is split as one profiled step was. Second stage: model evaluations "
        "without the sampler's own arithmetic"
    )
    figure = blank_figure(11.5, 1.9 + 0.5 * len(runs), f"Seconds to denoise 5 s of 1080p on one {data['gpu']}", note)
    axes = clean(figure.add_subplot())
    labelled: set[str] = set()
    for place, run in enumerate(runs):
        _bar(axes, place, run, labelled)
    axes.set_yticks(range(len(runs)), [_name(run) for run in runs], fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("s")
    axes.set_xlim(0, max(run["total_s"] for run in runs) * 1.22)
    axes.grid(False, axis="y")
    named = [name for name in (*COLOURS, NOT_SPLIT) if name in labelled]
    patches = [Patch(facecolor=COLOURS.get(name, UNKNOWN), label=name) for name in named]
    patches.append(Patch(facecolor="white", edgecolor=FAINT, hatch="///", label="extrapolated"))
    axes.legend(handles=patches, fontsize=8.5, frameon=False, loc="lower right")
    return figure


def _name(run: Json) -> str:
    stage = "second stage: " if run["preset"] == SECOND_STAGE else ""
    return re.sub(r"\(the default of \w+\)", "(default)", f"{stage}{form_of(run)}")


def _bar(axes: Axes, place: int, run: Json, labelled: set[str]) -> None:
    timed = steps_timed(run)
    parts = parts_of(run) or {NOT_SPLIT: 1.0}
    left, whole = 0.0, sum(parts.values())
    for name, seconds in parts.items():
        width = run["total_s"] * seconds / whole
        axes.barh(
            place,
            width,
            left=left,
            height=0.64,
            color=COLOURS.get(name, UNKNOWN),
            edgecolor="white",
            linewidth=0.6,
            hatch="" if timed == run["steps"] else "///",
            alpha=1.0 if timed == run["steps"] else 0.75,
        )
        labelled.add(name)
        if width > 3 and name in COLOURS:  # seconds: there is room for a number
            middle = (left + width / 2, place)
            ink = INK if name == "rest" else "white"
            axes.annotate(f"{width:.0f}", middle, ha="center", va="center", fontsize=8, color=ink, weight="bold")
        left += width
    steps = f"{run['steps']} steps" if timed == run["steps"] else f"{timed} of {run['steps']} steps timed"
    end: dict[str, Any] = {"xy": (left, place), "textcoords": "offset points", "va": "center"}
    axes.annotate(f" {total_of(run)} s", xytext=(0, 5), fontsize=9.5, weight="bold", color=INK, **end)
    axes.annotate(f" {steps}", xytext=(0, -6), fontsize=7.5, color=FAINT, **end)
