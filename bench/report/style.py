"""Colours, titles, notes and axes that every picture of the report has."""

from __future__ import annotations

import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID = "#1b1f24", "#6b737d", "#e6e8eb"
BLUE, ORANGE, GREEN, VIOLET, TEAL, RED, GREY = (
    "#1f6feb",
    "#d9480f",
    "#2b8a3e",
    "#862e9c",
    "#0b7285",
    "#c92a2a",
    "#868e96",
)


def blank_figure(width: float, height: float, title: str, note: str) -> Figure:
    """A figure of so many inches with its title above and a note, folded, below."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    lines = textwrap.fill(note, int(width * 14.5))  # characters of 8.5 pt that fit an inch
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=8.5, color=FAINT)
    return figure


def clean(axes: Axes, title: str = "") -> Axes:
    """Axes in the report's style."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.tick_params(labelsize=8.5, colors=FAINT, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c5cad0")
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    return axes
