"""The report's tables as plain rows."""

from __future__ import annotations

from bench.report.data import (
    KERNELS,
    ceilings,
    clips,
    form_of,
    parts_of,
    share_of,
    steps_timed,
    total_of,
)
from bench.results import Json, refusal
from bench.sampler_runs import SECOND_STAGE
from bench.table import Table
from happyhorse_fast.costs import CONTEXT_BYTES, cards_for

FORM_ORDER = ("eager bf16", "fast bf16", "fast int8", "fast fp8", "fast fp8 + sparsity")


def memory_table(data: Json) -> Table:
    """Peak per clip and form, and on which cards it fits."""
    rows = []
    for peak in data["peaks"]:
        on = [f"{card} GB" for card in cards_for(peak["peak_gib"] * 2**30)]
        clip = f"{peak['preset']}, {peak['resolution']}, {peak['seconds']} s"
        numbers = (f"{peak['peak_gib']:.1f}", f"{peak['weights_gib']:.1f}")
        rows.append((clip, peak["form"], *numbers, f"{on[0]} and up" if on else "none of 24, 48, 80 GB"))
    return Table(
        "Peak memory of a denoising step, GiB, weights included",
        ("clip", "form", "peak", "of it weights", "fits a card of"),
        tuple(rows),
        "Planned, not measured on a GPU: live tensors of a forward pass under fake tensors. A card of N GB counts as "
        f"N x 10^9 bytes, {CONTEXT_BYTES / 2**30:g} GiB of it for the CUDA context. Attention: "
        f"{', '.join(f'{attention} in fast {precision}' for precision, attention in data['attention'].items())}.",
    )


def launch_table(data: Json) -> Table:
    """Launches of a layer."""
    rows = [
        (f"fast {entry['precision']}", entry["masks"], *(f"{entry[name]}" for name in ("fewest", "most", "ours")))
        for entry in data["launches"]
    ]
    columns = ("form", "masks", "fewest", "most", "of them kernels of this package")
    note = (
        "Over all kinds of layer without a post-norm. The others are torch's: they find the largest of v and of the "
        "gate, or write one number each, for the scales of e4m3. int8 has two more for row codes, of proj's input and "
        "down's; where the MLP runs in chunks of rows, its kernels come once for each."
    )
    return Table("Kernel launches per layer", columns, tuple(rows), note)


def _number(value: float | None, form: str = ".1e") -> str:
    return "not finite" if value is None else format(value, form)


def _forms(cases: list[Json]) -> dict[str, str]:
    """Forms in a table's order, each with its name there: with attention where it is not in bf16."""
    of = {form["form"]: form["attention"] for case in cases for form in case["forms"]}
    return {name: name if of.get(name, "bf16") == "bf16" else f"{name}, attention {of[name]}" for name in FORM_ORDER}


def error_table(cases: list[Json]) -> Table:
    """End to end, per case and form: video and audio apart, what the step added, PSNR of the latents."""
    rows: list[tuple[str, ...]] = []
    named = _forms(cases)
    for case in cases:
        for form in case["forms"]:
            velocities = [form["errors"][f"velocity.{m}"] for m in ("video", "audio")]
            cells = [_number(error[measure]) for error in velocities for measure in ("relative_l2", "own")]
            latents = [form["errors"][f"latent.{m}"] for m in ("video", "audio")] if case["steps"] else []
            psnr = [_number(error["psnr_db"], ".1f") for error in latents]
            verdict = f"FAIL: {form['violations'][0]}" if form["violations"] else "pass"
            rows.append((case["case"], named[form["form"]], *cells, " / ".join(psnr), verdict))
    return Table(
        "Error end to end: relative L2 of the velocity to float32",
        ("case", "form", "video", "added", "audio", "added", "PSNR of latents, dB, video / audio", "budget"),
        tuple(rows),
        "added: distance to the form it comes from, so the kernels', 8 bits' and sparsity's own part; int8 and fp8 "
        "come from fast bf16. Small models with seeded random weights; for sparsity that is a hard case: random "
        "weights attend to all keys alike. Budget: fast bf16 within 2x of eager bf16's own error; 8 bits are stated "
        "and fail past 0.3.",
    )


def error_summary(cases: list[Json]) -> Table:
    """A row per case: every form's velocity error, video and audio."""
    rows = []
    for case in cases:
        cells = dict.fromkeys(FORM_ORDER, "")
        for form in case["forms"]:
            values = [form["errors"][f"velocity.{m}"]["relative_l2"] for m in ("video", "audio")]
            over = " (past its budget)" if form["violations"] else ""
            cells[form["form"]] = " / ".join(map(_number, values)) + over
        rows.append((f"`{case['case']}`", *cells.values()))
    return Table(
        "Error of the velocity, video / audio: relative L2 to float32",
        ("case", *_forms(cases).values()),
        tuple(rows),
        "Small models with seeded random weights. For sparsity (a quarter of the video blocks) that is a hard case: "
        "random weights attend to all keys alike, so every block that is left out counts.",
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
            pair = []
            for measure in ("relative_l2", "tile_distance"):
                found = [e[measure] for form in forms for what, e in form["errors"].items() if f".{op}." in what]
                pair.append(_number(None if None in found else max(found, default=None)))
            cells.append(" / ".join(pair))
        rows.append((op, *cells))
    return Table(
        "Error of each op by itself: relative L2 / worst 128x128 tile, to float32",
        ("op", *_forms(cases).values()),
        tuple(rows),
        "Each op runs on its float32 input; worst layer, modality and case. qkv and up include their norm; norm is the "
        "one before qkv. Sparsity changes attention alone.",
    )


def _ceilings_note(data: Json) -> str:
    """Name the ceilings that shares of a roofline are of."""
    parts = []
    for peaks in ceilings(data):
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in peaks.rates().items())
        parts.append(f"{peaks.source}: {rates} TFLOP/s, {peaks.bandwidth:.2g} TB/s")
    return f"Ceilings: {'; '.join(parts)}." if parts else ""


SPAN = {"tflops_useful": "useful TFLOP/s", "gbps": "GB/s", "roofline": "of roofline", "sm_mhz": "MHz", "power_w": "W"}


def ops_table(data: Json, *, whole: bool = False) -> Table:
    """A row per case of a GPU: all of our kernels, the fastest first, and all peers; said is where one is faster.

    ``whole``: with the other rates of the fastest kernel, and the clock and power of its span.
    """
    more = SPAN if whole else {}
    rows: list[tuple[str, ...]] = []
    by_case: dict[str, list[Json]] = {}
    for entry in data["entries"]:
        by_case.setdefault(entry["case"], []).append(entry)
    measured = ceilings(data)[-1:]
    sizes = {name.split("/")[1] for name in by_case}
    for case in sorted(by_case, key=lambda name: (name.split("/")[::2], name)):
        entries = sorted(by_case[case], key=lambda entry: entry["median_ms"] or float("inf"))
        first, name = entries[0], case
        if len(sizes) == 1 and case.count("/") == 2:
            name = "/".join(case.split("/")[::2])
        if (why := refusal(first)) is not None:
            rows.append((name, why, "", "", *([""] * len(more)), ""))
            continue
        ours = ", ".join(refusal(e) or f"{KERNELS.get(e['impl'], e['impl'])} {_short(e['median_ms'])}" for e in entries)
        rate = f"{first['tflops']:,.0f} TFLOP/s" if (first["tflops"] or 0) > 100 else f"{first['gbps'] / 1e3:.2f} TB/s"
        peers = sorted(first["peers"].items(), key=lambda item: item[1])
        share = share_of(first, measured[0]) if measured else None
        against = ", ".join(f"{name} {_short(ms)} ({_against(ms / first['median_ms'])})" for name, ms in peers)
        beside = ("" if first.get(key) is None else f"{first[key]:.4g}" for key in more)
        rows.append((name, ours, rate, "" if share is None else f"{share:.0%}", *beside, against))
    title = f"Every op against its peers at {', '.join(sorted(sizes))}, ms, {data['gpu']}, commit {data['commit']}"
    columns = ("case", "ours, fastest first", "rate", "of the measured ceiling", *more.values())
    note = (
        "Every case passed its gate against float64 at this shape before it was timed, or says that it did not. "
        "Product only: without the norm, activation or residual that ours has in it. No "
        "gate: its numbers were not checked. eager is the reference in bf16, for cases of 8 bits too. "
        f"{_ceilings_note(data)} {_turns_note(data)}"
    )
    return Table(title, (*columns, "peers (their time over ours)"), tuple(rows), note)


def _turns_note(data: Json) -> str:
    """Say how times that are compared were taken."""
    alone = [entry for entry in data["entries"] if entry["peers"] and not entry.get("span")]
    if not alone:
        return "What is compared took turns on a warm chip."
    which = "Each kernel was" if not any(entry.get("span") for entry in data["entries"]) else "Some kernels were"
    return f"{which} timed alone on a chip held at its power limit: differences under 20 % may be the order of timing."


def _against(ratio: float) -> str:
    return f"{ratio:.2f}x{': ours is SLOWER' if round(ratio, 2) < 1 else ''}"


def _short(ms: float) -> str:
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def clip_table(data: Json) -> Table:
    """A GPU's runs of the sampler, the slowest first."""
    rows = []
    for run in clips(data):
        failed = run["s_per_step"] is None
        numbers = "" if failed else f"{run['s_per_step']:.2f}"
        peak = "" if run["peak_memory_gib"] is None else f"{run['peak_memory_gib']:.1f}"
        parts = ", ".join(f"{name} {s:.2f}" for name, s in parts_of(run).items() if s >= 0.005)
        notes = [part for part in (run.get("note") or "").split("; ") if not part.endswith("steps timed")]
        timed = "" if failed else f"{steps_timed(run)} of {run['steps']}"
        cells = (numbers, total_of(run), timed, peak, "; ".join(filter(None, [parts, *notes])))
        stage = " (second stage)" if run["preset"] == SECOND_STAGE else ""
        clip = f"{run['preset']}{stage}, {run['resolution']}, {run['seconds']} s"
        rows.append((clip, form_of(run), *cells))
    columns = ("clip", "form", "s/step", "denoising, s", "steps timed", "peak GiB", "seconds of a profiled step")
    note = "~: extrapolated from the median of the steps that were timed. Wall time of denoising alone, random weights."
    return Table(f"The clip, {data['gpu']}, commit {data['commit']}", columns, tuple(rows), note)


def gpu_tables(data: Json) -> list[Table]:
    """Tables of one GPU's results."""
    return [*([clip_table(data)] if data["sampler"] else []), *([ops_table(data)] if data["entries"] else [])]
