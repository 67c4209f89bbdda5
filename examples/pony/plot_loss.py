"""Draw a run's loss curve from its loss.csv.

Run with ``python examples/pony/plot_loss.py <loss.csv> <picture.png>``.
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(table: Path, picture: Path) -> None:
    """Mean square errors of video and audio over steps, on a logarithmic scale; dashed on the model's own states."""
    rows = list(csv.DictReader(table.open(newline="")))
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(7.0, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, colour, line in (
        ("video", "#1f6feb", "-"),
        ("audio", "#d9480f", "-"),
        ("rollout_video", "#1f6feb", "--"),
        ("rollout_audio", "#d9480f", "--"),
    ):
        values = [float(row[name] or "nan") for row in rows]
        if not all(map(math.isnan, values)):
            axes.plot(steps, values, line, label=name.replace("_", ", "), color=colour, linewidth=1.2)
    axes.set(xlabel="step (16 clips each)", ylabel="mean square error", yscale="log")
    axes.grid(which="both", color="#e6e8eb")
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
