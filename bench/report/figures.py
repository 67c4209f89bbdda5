"""The report's pictures, drawn from committed results; predictions are drawn hollow or hatched and named as such."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bench.cases import FULL_SIZES
from bench.measure.roofline import gpu_named
from bench.report.data import Report, clips, form_of, measured_ceilings, parts_of, steps_timed, total_of
from bench.report.style import BLUE, FAINT, GREEN, GREY, INK, ORANGE, TEAL, VIOLET, blank_figure, clean
from bench.results import Json
from bench.sampler_runs import PUBLISHED_SECONDS, SECOND_STAGE
from happyhorse_fast.block_map import BLOCK, BlockMap, Layout
from happyhorse_fast.costs import GPUS
from happyhorse_fast.eager.rotary import apply_rotary, frequency_bands, rotary_phases
from happyhorse_fast.eager.sequence import Clip, coordinates

FORM_STYLE = {
    "eager bf16": (GREY, "o"),
    "fast bf16": (BLUE, "s"),
    "fast int8": (GREEN, "v"),
    "fast fp8": (ORANGE, "D"),
    "fast fp8 + sparsity": (VIOLET, "^"),
}
PART_COLOURS = {
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
FORMAT_COLOURS = {"bf16": BLUE, "int8": GREEN, "int8_qk": TEAL, "fp8": ORANGE}
SIZE, WHAT = FULL_SIZES[0], "15B model, 1080p, 5 s"


def figures(report: Report) -> dict[str, Figure]:
    """Every picture but the pony's; of the clip where the newest GPU has denoised one."""
    _, data = report.newest
    return {
        "roofline": roofline(report),
        "block_maps": block_maps(),
        **({"clip": clip(report)} if any(run["total_s"] for run in data["sampler"]) else {}),
        "error_per_layer": error_per_layer(report.cases),
        "memory": memory(report.memory),
    }


# Speed ----------------------------------------------------------------------------------------------------------------


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
    names = [f"{'second stage: ' if run['preset'] == SECOND_STAGE else ''}{form_of(run)}" for run in runs]
    names = [re.sub(r"\(the default of \w+\)", "(default)", name) for name in names]
    axes.set_yticks(range(len(runs)), names, fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("s")
    axes.set_xlim(0, max(run["total_s"] for run in runs) * 1.22)
    axes.grid(False, axis="y")
    named = [name for name in (*PART_COLOURS, NOT_SPLIT) if name in labelled]
    patches = [Patch(facecolor=PART_COLOURS.get(name, UNKNOWN), label=name) for name in named]
    patches.append(Patch(facecolor="white", edgecolor=FAINT, hatch="///", label="extrapolated"))
    axes.legend(handles=patches, fontsize=8.5, frameon=False, loc="lower right")
    return figure


def _bar(axes: Axes, place: int, run: Json, labelled: set[str]) -> None:
    timed = steps_timed(run)
    look: dict[str, Any] = {} if timed == run["steps"] else {"hatch": "///", "alpha": 0.75}
    parts = parts_of(run) or {NOT_SPLIT: 1.0}
    left, whole = 0.0, sum(parts.values())
    for name, seconds in parts.items():
        width = run["total_s"] * seconds / whole
        colour = PART_COLOURS.get(name, UNKNOWN)
        axes.barh(place, width, left=left, height=0.64, color=colour, edgecolor="white", linewidth=0.6, **look)
        labelled.add(name)
        if width > 3 and name in PART_COLOURS:  # seconds: there is room for a number
            middle = (left + width / 2, place)
            ink = INK if name == "rest" else "white"
            axes.annotate(f"{width:.0f}", middle, ha="center", va="center", fontsize=8, color=ink, weight="bold")
        left += width
    steps = f"{run['steps']} steps" if timed == run["steps"] else f"{timed} of {run['steps']} steps timed"
    end: dict[str, Any] = {"xy": (left, place), "textcoords": "offset points", "va": "center"}
    axes.annotate(f" {total_of(run)} s", xytext=(0, 5), fontsize=9.5, weight="bold", color=INK, **end)
    axes.annotate(f" {steps}", xytext=(0, -6), fontsize=7.5, color=FAINT, **end)


def roofline(report: Report) -> Figure:
    """TFLOP/s of every case over its FLOP per byte, under the datasheet's roof and under the measured one."""
    _, data = report.newest  # one card: another's rates would not lie under this roof
    card = gpu_named(data["gpu"]) or GPUS["h100"]
    measured = [e for e in data["entries"] if e["verified"] and e["tflops"] and e["gbps"]]
    reached = measured_ceilings(data)
    most = f"; dashed: the most that was measured there, {reached.bandwidth:.2g} TB/s" if reached else ""
    note = (
        f"solid: {card.source}{most}. {len(measured)} measured: square Gluon, circle Triton, triangle CUDA; teal: int8 "
        "q and k. Names stand over the case in 8 bits. Norms: no FLOPs."
    )
    figure = blank_figure(10.5, 6.4, f"Roofline, {card.name.upper()}: {WHAT}", note)
    axes = clean(figure.add_subplot())
    reach = np.logspace(0.4, 5.2, 200)
    eight = "fp8" if card.fp8 else "int8"  # of one rate where there are both
    roofs = [("datasheet", name, card.rate(name) / 1e12, card.bandwidth, "-") for name in ("bf16", eight)]
    if reached:
        roofs += [("measured", name, rate, reached.bandwidth, "--") for name, rate in reached.rates().items()]
    for source, name, rate, bandwidth, dashes in roofs:
        label = f"{name}, {source}: {rate:,.0f}"
        axes.plot(reach, np.minimum(rate, reach * bandwidth), dashes, color=FORMAT_COLOURS[name], label=label)
    named: dict[str, float] = {}
    for entry in measured:
        kind, *_, name = entry["case"].split("/")
        intensity = 1e3 * entry["tflops"] / entry["gbps"]
        marker = {"hopper": "s", "cuda": "^"}.get(entry["impl"], "o")
        axes.plot(intensity, entry["tflops"], marker, color=FORMAT_COLOURS.get(name, BLUE), ms=5, alpha=0.8)
        if name == eight:
            named[kind] = intensity
    for kind, intensity in named.items():
        axes.text(intensity, 2500, kind, rotation=90, ha="center", va="bottom", fontsize=8, color=INK)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of compulsory traffic", ylabel="TFLOP/s")
    axes.set_xlim(reach[0], reach[-1])
    axes.set_ylim(3, 80000)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")
    return figure


# Block maps -----------------------------------------------------------------------------------------------------------


def block_maps() -> Figure:
    """The trained window, a quarter of the video blocks by pooled score, and 3D tiles; one clip of 1080p, 5 s."""
    grid = SIZE.grid
    layout = Layout(grid.frames, grid.frame_tokens, grid.audio, grid.text, align_frames=True, align_modalities=True)
    dense = BlockMap.frame_window(layout, None)
    video_blocks = -(-layout.audio_start // BLOCK)
    q = _positions_alone(layout, grid)
    window = SIZE.config.frame_receptive_field
    maps = {
        f"trained window: frames within {window}": BlockMap.frame_window(layout, window),
        "top 25 % of video blocks, by position alone": BlockMap.top_k(q, q, layout, video_blocks // 4, base=dense),
        "tiles: 6 frames, 8 rows, 60 columns": BlockMap.tile_window(layout, grid.columns, (1, 1, 1), (6, 8, 60), dense),
    }
    note = (
        "blocks of 128 x 128 tokens. The choice in the middle depends on q and k; here every token has the same ones, "
        "so the rotary position decides alone"
    )
    figure = blank_figure(14, 5.9, "Block maps of the 15B model, 1080p, 5 s", note)
    for axes, (name, block_map) in zip(figure.subplots(1, 3), maps.items(), strict=True):
        block_map.plot(axes, layout=layout)
        axes.set_title(f"{name}\n{axes.get_title()}", fontsize=9.5, color=INK, pad=20)
        axes.tick_params(labelsize=7.5, colors=FAINT)
    return figure


def _positions_alone(layout: Layout, grid: Clip) -> torch.Tensor:
    """[slots, 1, D]: one vector for every token, rotated to the token's place."""
    coords = coordinates(grid, SIZE.config.coords_style)
    token = torch.ones(len(coords), 1, SIZE.config.head_dim)
    rotated = apply_rotary(token, rotary_phases(coords, frequency_bands(SIZE.config.head_dim)))
    rows = torch.cat([torch.arange(*span) for span in (*layout.frame_spans(), *layout.prefix_spans())])
    out = torch.zeros(layout.slots, 1, SIZE.config.head_dim)
    out[rows] = rotated
    return out.bfloat16()


# Errors ---------------------------------------------------------------------------------------------------------------


def error_per_layer(cases: list[Json]) -> Figure:
    """Relative L2 of the residual stream after every layer, per form, video and audio apart."""
    note = "relative L2 to eager float32 of the residual stream, errors of earlier layers included; out: the velocity"
    figure = blank_figure(3.1 * len(cases) + 1, 5.4, "Error per layer", note)
    panels = figure.subplots(2, len(cases), sharey=True, squeeze=False)
    for column, case in enumerate(cases):
        for row, modality in enumerate(("video", "audio")):
            axes = clean(panels[row][column], f"{case['case']}: {modality}" if row == 0 else modality)
            places = [f"layer.{i}.{modality}" for i in range(case["layers"])] + [f"velocity.{modality}"]
            for form in case["forms"]:
                colour, marker = FORM_STYLE[form["form"]]
                errors = [form["errors"][place]["relative_l2"] for place in places]
                axes.plot(range(len(places)), errors, color=colour, label=form["form"], **_marker(form["form"], marker))
            axes.set_yscale("log")
            axes.set_xticks(range(len(places)), [*map(str, range(case["layers"])), "out"])
    for axes in panels[:, 0]:
        axes.set_ylabel("relative L2")
    named = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, ncols=len(named), fontsize=9, frameon=False, loc="outside upper right")
    return figure


def _marker(form: str, marker: str) -> dict[str, Any]:
    """Eager bf16 as a ring around what lies on it: fast bf16 mostly does."""
    if form.startswith("eager"):
        return {"marker": marker, "ms": 10, "mfc": "none", "mew": 1.4, "lw": 0}
    return {"marker": marker, "ms": 4, "lw": 1.4}


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(data: Json) -> Figure:
    """Live bytes along one layer of each kind, on top of the weights of the whole model."""
    note = (
        "tensors that live beside the weights, the residual stream included; traced on a pretended device (fake "
        "tensors): shapes and lifetimes, not a measurement of a GPU. Within a layer: operations in order"
    )
    clip = data["timelines"][0]
    title = f"Memory over one layer of each kind: {clip['preset']}, {clip['resolution']}, {clip['seconds']} s"
    figure = blank_figure(12.5, 4.6, title, note)
    panels = figure.subplots(1, len(data["timelines"]), sharey=True)
    for axes, timeline in zip(panels, data["timelines"], strict=True):
        _memory_panel(axes, timeline)
    panels[0].set_ylabel("GiB beside the weights")
    return figure


def _memory_panel(axes: Axes, timeline: Json) -> None:
    x: list[float] = []
    for place, layer in enumerate(timeline["layers"]):
        count = len(layer["activations_gib"])
        x += [place + i / count for i in range(count)]
        if place:
            axes.axvline(place, color="#c5cad0", lw=0.8)
    live = [value for layer in timeline["layers"] for value in layer["activations_gib"]]
    operations = [name for layer in timeline["layers"] for name in layer["operations"]]
    peak = max(range(len(live)), key=live.__getitem__)
    weights = timeline["weights_gib"]
    clean(axes, f"{timeline['form']}\n{weights:.1f} weights + {live[peak]:.1f} = {weights + live[peak]:.1f} GiB")
    axes.fill_between([*x, len(timeline["layers"])], 0, [*live, live[-1]], step="post", color=BLUE, linewidth=0)
    axes.annotate(
        f"peak: {operations[peak]}", (x[peak], live[peak]), (2, 3), textcoords="offset points", fontsize=8.5, color=INK
    )
    names = [layer["kind"].replace(" ", "\n") for layer in timeline["layers"]]
    axes.set_xticks([i + 0.5 for i in range(len(names))], names, fontsize=7.5)
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(0, len(names)), ylim=(0, None))
    axes.grid(False, axis="x")
