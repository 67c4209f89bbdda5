"""The report's part on the pony: how often its clips are right, and what precision and sparsity cost them."""

from __future__ import annotations

from matplotlib.figure import Figure

from bench.report.data import Report
from bench.report.style import BLUE, GREEN, INK, ORANGE, RED, VIOLET, blank_figure, clean
from bench.results import Json
from bench.table import Table
from happyhorse_fast.cli import fidelity_tables
from happyhorse_fast.config import OPS
from happyhorse_fast.verify.equivalence import EAGER

KIND_COLOURS = {"bf16": BLUE, "int8 op": "#69b37a", "int8": GREEN, "fp8 op": ORANGE, "fp8": RED, "sparsity": VIOLET}
WHOLE = ("bf16", "int8", "fp8")
"""Kinds of policies that take every product to a precision."""


def rates_table(rates: list[Json]) -> Table:
    """Share of clips per thing that a prompt asks for."""
    columns = ("from", *rates[0]["rates"])
    rows = []
    for data in rates:
        name = "prompt and first picture" if data["image"] else "prompt"
        rows.append((f"{name}, {data['clips']} clips", *(f"{100 * rate:.0f} %" for rate in data["rates"].values())))
    failed = [entry["prompt"] for data in rates[:1] for entry in data["failed"]]
    note = (
        f"Held-out prompts, {rates[0]['steps']} steps, read from pixels and samples alone; sync: every impact heard "
        f"within 2 frames of when it is seen. "
    )
    note += f"Wrong from the prompt alone: {', '.join(failed)}." if failed else "Nothing was wrong."
    return Table("How often a clip shows and sounds as asked", columns, tuple(rows), note)


def fidelity_table(found: Json) -> Table:
    """List what each policy costs."""
    rows = fidelity_tables.rows(found)
    note = (
        f"{fidelity_tables.NOTE} Sparsity decides between latent frames, 13 blocks of 16 tokens; by itself a clip is "
        "two blocks of 128, too few to leave any out."
    )
    return Table(fidelity_tables.title(found), fidelity_tables.COLUMNS, tuple(rows), note)


def precisions_table(found: Json) -> Table:
    """List what whole precisions cost: fast bf16, int8 and fp8 side by side."""
    of = zip(fidelity_tables.rows(found), found["results"], strict=True)
    rows = [row for row, result in of if result["kind"] in WHOLE and result["name"] != EAGER]
    shown = [i for i, name in enumerate(fidelity_tables.COLUMNS) if name not in ("kept", "SSIM", "sync")]
    columns = tuple(fidelity_tables.COLUMNS[i] for i in shown)
    note = (
        "Each clip against float32's of the same noise; PSNR and sound (log-spectral distance): median/worst, L2 of "
        "the audio latent: median. moved: clips in which a heard, and a seen, impact moved. Which op it comes from, "
        "and what sparsity costs: [examples/pony](examples/pony/README.md#how-well-it-does)."
    )
    return Table(fidelity_tables.title(found), columns, tuple(tuple(row[i] for i in shown) for row in rows), note)


def settings_table(found: Json) -> Table:
    """The FastConfig behind each policy."""
    names = [row[0] for row in fidelity_tables.rows(found)]
    rows = [(name, result["settings"] or "the default") for name, result in zip(names, found["results"], strict=True)]
    rows = [row for row in rows if not row[0].startswith("eager")]
    return Table("FastConfig of each policy", ("policy", "fields"), tuple(rows))


def figures(report: Report) -> dict[str, Figure]:
    """Every picture of the pony."""
    return {"fidelity": fidelity_figure(report.fidelity), "activations": activations_figure(report.calibration)}


def fidelity_figure(found: Json) -> Figure:
    """Every clip of every policy: pictures, sound, latents of the sound."""
    results = found["results"]
    note = (
        f"{found['clips']} held-out prompts against float32 of the same noise; dots: clips, bars: medians. The pony "
        "has 7.4 M parameters: what of this carries over to 15 B is in decision 0010"
    )
    figure = blank_figure(11.5, 1.5 + 0.26 * len(results), "What precision and sparsity cost a trained model", note)
    names = [row[0] for row in fidelity_tables.rows(found)]
    measures = {
        "psnr_db": "pictures, PSNR dB: right is better",
        "sound_db": "sound, log-spectral distance dB: left is better",
        "audio_error": "relative L2 of the audio latent: left is better",
    }
    panels = figure.subplots(1, len(measures), sharey=True)
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        clean(axes)
        for place, result in enumerate(results):
            colour = KIND_COLOURS[result["kind"]]
            values = [clip[measure] for clip in result["clips"]]
            axes.plot(values, [place] * len(values), "o", ms=3, color=colour, alpha=0.4, mew=0)
            axes.plot([result["summary"][measure][0]], [place], "|", ms=13, mew=2.2, color=colour)
        axes.set_xlabel(label)
        if measure != "psnr_db":
            axes.set_xscale("log")
    panels[0].set_yticks(range(len(names)), names, fontsize=8.5, color=INK)
    panels[0].invert_yaxis()
    return figure


def activations_figure(found: Json) -> Figure:
    """Ranges of every input of every op, and what the op loses in each format; a dot a layer."""
    inputs = [(name, of) for entry in found["ops"] for name, of in entry["inputs"].items()]
    names = list(dict.fromkeys(name for name, _ in inputs))
    note = (
        f"{found['clips']} clip of {found['steps']} steps, a dot a layer. In e4m3, under the scales of its op, at most "
        f"{max(of['saturated'] for _, of in inputs):.1%} of an input lie past the largest code, and at most "
        f"{max(of['lost'] for _, of in inputs):.1%} become zero. Error: of the op's result to float32's on the same "
        "input, in its worst step and modality"
    )
    figure = blank_figure(12.5, 4.6, "Ranges of activations, and what ops lose in each format", note)
    ranges = {
        "largest magnitude": ([of["largest"] for _, of in inputs], (1, 100)),
        "root mean square": ([of["rms"] for _, of in inputs], (0.1, 10)),
        "largest magnitude / RMS": ([of["largest"] / of["rms"] for _, of in inputs], (1, 1000)),
    }
    *panels, errors = figure.subplots(1, len(ranges) + 1)
    for axes, (label, (values, decades)) in zip(panels, ranges.items(), strict=True):
        clean(axes, label)
        axes.plot(values, [names.index(name) for name, _ in inputs], "o", ms=4, color=BLUE, alpha=0.6, mew=0)
        axes.set(xscale="log", xlim=decades)
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names), fontsize=9, color=INK)
        axes.invert_yaxis()
    clean(errors, "relative L2 of an op's result")
    of_op = [OPS.index(entry["op"]) for entry in found["ops"]]
    for precision, colour in zip(WHOLE, (BLUE, GREEN, RED), strict=True):
        worst = [max(entry["errors"][precision].values()) for entry in found["ops"]]
        errors.plot(worst, of_op, "o", ms=4, color=colour, alpha=0.6, mew=0, label=precision)
    errors.set(xscale="log", xlim=(1e-3, 1))
    errors.set_yticks(range(len(OPS)), OPS, fontsize=9, color=INK)
    errors.invert_yaxis()
    errors.legend(fontsize=8.5, frameon=False, loc="lower right")
    return figure


def section(report: Report) -> list[str]:
    """The pony's part of the main README, in Markdown."""
    return [
        rates_table(report.rates).markdown(),
        "![Clips of held-out prompts with their sound](examples/pony/results/sheet.png)",
        precisions_table(report.fidelity).markdown(),
    ]


def own_section(report: Report) -> str:
    """The generated part of the pony's own README."""
    pictures = (
        "![What precision and sparsity cost each clip](../../docs/report/fidelity.png)",
        "![Ranges of activations, and what ops lose in each format](../../docs/report/activations.png)",
    )
    tables = (rates_table(report.rates), fidelity_table(report.fidelity), settings_table(report.fidelity))
    return "\n\n".join([*(table.markdown() for table in tables), *pictures])
