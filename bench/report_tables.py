"""The report's tables as plain rows, and the Markdown and HTML they become."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report_data import Report, fits, rows_of, worst
from bench.results import Json
from happyhorse_fast.costs import CARDS, CONTEXT_BYTES

FORM_ORDER = ("eager bf16", "fast bf16", "fast fp8", "fast fp8 + sparsity")
NO_GPU = "No results of a GPU are committed yet, so there is no measured speed here."


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it holds, units included.
        columns: Headers.
        rows: Cells, as text.
        note: What a reader must know to read it right.
        marks: Rows to draw attention to, by their place.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marks: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """GitHub's dialect; the first column at the left, the others at the right."""
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.columns)} |"]
        lines.append("|" + "---|" + "---:|" * (len(self.columns) - 1))
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])

    def html(self) -> str:
        """A table element with its title and note; marked rows have the class ``mark``."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            f"<tr{' class=mark' if place in self.marks else ''}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for place, row in enumerate(self.rows)
        )
        note = f"<p class=note>{html.escape(self.note)}</p>" if self.note else ""
        title = f"<h3>{html.escape(self.title)}</h3>"
        return f"{title}<div class=scroll><table><tr>{head}</tr>{body}</table></div>{note}"


def memory_table(data: Json) -> Table:
    """Peak per clip and form, and on which cards it fits."""
    rows = []
    for peak in data["peaks"]:
        on = [f"{card} GB" for card in CARDS if fits(peak["peak_gib"], card)]
        clip = f"{peak['preset']}, {peak['resolution']}, {peak['seconds']} s"
        numbers = (f"{peak['peak_gib']:.1f}", f"{peak['weights_gib']:.1f}")
        rows.append((clip, peak["form"], *numbers, f"{on[0]} and up" if on else "none of 24, 48, 80 GB"))
    return Table(
        "Peak memory of a denoising step, GiB, weights included",
        ("clip", "form", "peak", "of it weights", "fits a card of"),
        tuple(rows),
        "Planned, not measured on a GPU: live tensors of a forward pass under fake tensors. A card of N GB counts as "
        f"N x 10^9 bytes, {CONTEXT_BYTES / 2**30:g} GiB of it for the CUDA context. fast fp8: attention in "
        f"{data['attention']}.",
    )


def launch_table(data: Json) -> Table:
    """Launches of a layer."""
    rows = [
        (f"fast {entry['precision']}", entry["masks"], f"{entry['fewest']}", f"{entry['most']}")
        for entry in data["launches"]
    ]
    columns = ("form", "masks", "fewest", "most")
    return Table("Kernel launches per layer", columns, tuple(rows), "Over all kinds of layer without a post-norm.")


def _number(value: float | None, form: str = ".1e") -> str:
    return "not finite" if value is None else format(value, form)


def _attention(cases: list[Json]) -> str:
    return f"Attention in fast fp8: {' and '.join(sorted({case['attention'] for case in cases}))}."


def _with_attention(form: str, cases: list[Json]) -> str:
    """A form's name in a table where it has attention in fp8, which it does not by default."""
    kinds = sorted({case["attention"] for case in cases} - {"bf16"})
    return f"{form}, attention {' and '.join(kinds)}" if "fp8" in form and kinds else form


def error_table(cases: list[Json]) -> Table:
    """End to end, per case and form: video and audio apart, what the step added, PSNR of the latents."""
    rows: list[tuple[str, ...]] = []
    marks: set[int] = set()
    for case in cases:
        for form in case["forms"]:
            if form["violations"]:
                marks.add(len(rows))
            cells = [
                _number(form["errors"][f"velocity.{modality}"][measure])
                for modality in ("video", "audio")
                for measure in ("relative_l2", "own")
            ]
            psnr = [
                _number(worst(form, "latent", m, "psnr_db"), ".1f") if case["steps"] else "" for m in ("video", "audio")
            ]
            verdict = f"FAIL: {form['violations'][0]}" if form["violations"] else "pass"
            rows.append((case["case"], form["form"], *cells, " / ".join(psnr), verdict))
    return Table(
        "Error end to end: relative L2 of the velocity to float32",
        ("case", "form", "video", "added", "audio", "added", "PSNR of latents, dB, video / audio", "budget"),
        tuple(rows),
        "added: distance to the form above it, so the kernels', fp8's and sparsity's own part. Small models with "
        "seeded random weights; for sparsity that is a hard case: random weights attend to all keys alike. "
        "Budget: fast bf16 within 2x of eager bf16's own error; fp8 is stated and fails past 0.3. "
        f"{_attention(cases)}",
        frozenset(marks),
    )


def error_summary(cases: list[Json]) -> Table:
    """A row per case: every form's velocity error, video and audio."""
    rows = []
    for case in cases:
        cells = []
        for name in FORM_ORDER:
            form = next((form for form in case["forms"] if form["form"] == name), None)
            values = (
                [] if form is None else [form["errors"][f"velocity.{m}"]["relative_l2"] for m in ("video", "audio")]
            )
            over = " (past its budget)" if form is not None and form["violations"] else ""
            cells.append(" / ".join(map(_number, values)) + over)
        rows.append((f"`{case['case']}`", *cells))
    return Table(
        "Error of the velocity, video / audio: relative L2 to float32",
        ("case", *(_with_attention(name, cases) for name in FORM_ORDER)),
        tuple(rows),
        "Small models with seeded random weights. For sparsity (a quarter of the video blocks) that is a hard case: "
        f"random weights attend to all keys alike, so every block that is left out counts. {_attention(cases)}",
    )


def op_table(cases: list[Json]) -> Table:
    """Worst layer and case of every op and form."""
    rows = []
    for op in ("norm", "qkv", "attention", "proj", "up", "down"):
        cells = []
        for name in FORM_ORDER:
            forms = [form for case in cases for form in case["forms"] if form["form"] == name]
            if "sparsity" in name and op != "attention":
                cells.append("")
                continue
            for measure in ("relative_l2", "tile_distance"):
                values = [worst(form, f"op.{op}", m, measure) for form in forms for m in ("video", "audio")]
                finite = [value for value in values if value is not None]
                cells.append(_number(max(finite) if len(finite) == len(values) and values else None))
        rows.append((op, *_pairs(cells)))
    return Table(
        "Error of each op by itself: relative L2 / worst 128x128 tile, to float32",
        ("op", *FORM_ORDER),
        tuple(rows),
        "Each op runs on its float32 input; worst layer, modality and case. qkv and up include their norm; norm is the "
        "one before qkv. Sparsity changes attention alone.",
    )


def _pairs(cells: list[str]) -> list[str]:
    joined, rest = [], list(cells)
    while rest:
        first = rest.pop(0)
        joined.append(f"{first} / {rest.pop(0)}" if first else "")
    return joined


def bench_table(path: Path, data: Json, most: int | None = None) -> Table:
    """A GPU's microbenchmarks, at most so many: what is not verified has no number, what is slower is marked."""
    rows: list[tuple[str, ...]] = []
    marks: set[int] = set()
    every = rows_of(data)
    for row in every[:most]:
        if row.verdict in ("slower", "not verified"):
            marks.add(len(rows))
        numbers: list[Any] = [row.median_ms, row.tflops, row.tflops_useful, row.gbps]
        cells = ["" if value is None else f"{value:,.3g}" for value in numbers]
        share = "" if row.roofline is None else f"{row.roofline:.0%}"
        rows.append((row.case, row.impl, *cells, share, row.note))
    title = f"{data['gpu']}: {path.stem}, torch {data['torch']}, Triton {data['triton']}, driver {data['driver']}"
    columns = ("case", "on", "ms", "TFLOP/s", "useful", "GB/s", "of roofline", "best peer")
    absent = "; ".join(f"{name}: {why}" for name, why in data.get("absent", {}).items())
    notes = [f"{len(rows)} of {len(every)} cases, those that need attention first."] if len(rows) < len(every) else []
    notes += [f"Peers that were absent: {absent}."] if absent else []
    return Table(title, columns, tuple(rows), " ".join(notes), frozenset(marks))


def sampler_table(path: Path, data: Json) -> Table:
    """A GPU's sampler runs."""
    rows = []
    for run in data["sampler"]:
        numbers = [run["s_per_step"], run["total_s"], run["peak_memory_gib"]]
        cells = ["" if value is None else f"{value:.2f}" for value in numbers]
        clip = f"{run['preset']}, {run['resolution']}, {run['seconds']} s"
        card = f"{run['cap_gb']} GB" if run.get("cap_gb") else "whole"
        spent = sorted((run.get("breakdown") or {}).items(), key=lambda item: -item[1])
        notes = [f"{name} {seconds:.2f} s" for name, seconds in spent if seconds >= 0.005]
        notes += [run["note"]] if run.get("note") else []
        on = "" if run.get("backend") in (None, "auto") else f", {run['backend']}"
        rows.append((clip, run["mode"] + on, run.get("mask") or "", card, str(run["steps"]), *cells, ", ".join(notes)))
    columns = ("clip", "mode", "mask", "card", "steps", "s/step", "total s", "peak GiB", "of a step, and notes")
    return Table(f"Sampler, {data['gpu']}: {path.stem}", columns, tuple(rows))


def gpu_tables(report: Report, most: int | None = None) -> list[Table]:
    """Tables of every GPU file, newest first.

    Args:
        report: The results.
        most: Microbenchmarks to show of each file; None for all.
    """
    tables = []
    for path, data in reversed(report.gpu.items()):
        tables += [sampler_table(path, data)] if data["sampler"] else []
        tables += [bench_table(path, data, most)] if data["entries"] else []
    return tables
