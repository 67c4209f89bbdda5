"""``happyhorse-fast demo``: the small trained model makes a clip with sound from a prompt, eager beside fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from happyhorse_fast import optional
from happyhorse_fast.cli.output import JsonOption, Shown, emit, literal, save_tensors, table, verdict
from happyhorse_fast.files import real_path, replacing, require_folder, require_target

if TYPE_CHECKING:
    from happyhorse_fast.verify.fidelity import ClipRun

PROMPT = "a large red ball bounces twice"
CLIP, SHEET, LATENTS = "clip.mp4", "clip.png", "clip.safetensors"
NEEDS = {CLIP: "av", SHEET: "matplotlib"}
SHOWN = "fast bfloat16"
"""The form whose clip becomes the mp4: the exact one of the fast forms. All of them are in the contact sheet."""
CHECK = [sys.executable, "-m", "happyhorse_fast", "verify", "--kernels", "--device", "cpu", "--json"]
"""Checks every kernel. Whether kernels are interpreted is decided at their import, hence in a process of its own."""
ERRORS = ("video_error", "audio_error", "psnr_db")


def demo(
    prompt: Annotated[
        str,
        typer.Option(
            help="a <large|medium|small> <red|green|blue|yellow|purple|white> ball bounces <once|twice|three times> "
            "[on the left|in the middle|on the right]"
        ),
    ] = PROMPT,
    image: Annotated[
        Path | None,
        typer.Option(help="Image to video: the first picture, a PNG or JPEG or a film's first; its middle square."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; the model was trained for 8.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the clip, its contact sheet and latents.")] = Path(
        "happyhorse-demo"
    ),
    as_json: JsonOption = False,
) -> None:
    """Make a clip with sound on the CPU: 7.4 M parameters, 8 steps, eager and in every fast form (backend reference).

    Beside them every Triton kernel is checked against plain torch, in Triton's interpreter. Exit code 1 where one is
    off, or where the clip or the contact sheet could not be written: the latents are there first.
    """
    from happyhorse_fast.pony.media import read_image
    from happyhorse_fast.pony.prompt import parse
    from happyhorse_fast.verify import fidelity
    from happyhorse_fast.verify.forms import FORMS

    require_folder(out)
    for name in (CLIP, SHEET, LATENTS) if out.is_dir() else ():
        require_target(out / name, force=True)
    prompt = str(parse(prompt))
    picture = None if image is None else read_image(image)
    missing = {name: why for name, package in NEEDS.items() if (why := optional.obstacle(package)) is not None}
    for name, why in missing.items():  # before the work, not after it
        print(f"no {name}: {why}", file=sys.stderr)
    if not as_json:
        print(f"{len(FORMS)} clips of {steps} steps on the CPU, about 40 s...", file=sys.stderr)
    start = time.perf_counter()
    with interpreted_kernels() as checked:
        runs = fidelity.make_clips(prompt, FORMS, seed=seed, steps=steps, picture=picture)
        kernels, why_no_kernels = checked()
    settings = {"prompt": prompt, "image": image, "seed": seed, "steps": steps}
    failed = _write(out, runs, settings, missing)
    seconds = time.perf_counter() - start
    data: dict[str, Any] = {**settings, "seconds": seconds, "clip_form": SHOWN, "latents": out / LATENTS}
    for key, name in (("clip", CLIP), ("sheet", SHEET)):
        why = (missing | failed).get(name)
        data |= {key: out / name if why is None else None, f"why_no_{key}": why and f"no {name}: {why}"}
    data["forms"] = [
        {"form": run.form, "seconds": run.seconds} | {name: getattr(run.error, name) for name in ERRORS} for run in runs
    ]
    data |= {"kernels": kernels, "why_no_kernels": why_no_kernels}
    emit(data, as_json, _shown(data))
    if failed or not all(check["passed"] for check in kernels):
        raise typer.Exit(1)


@contextmanager
def interpreted_kernels() -> Iterator[Callable[[], tuple[list[dict[str, Any]], str | None]]]:
    """Start the check; yields what waits for its results, or says why there are none. It ends with the caller."""
    from happyhorse_fast.ops.runtime.obstacles import triton_missing

    why_not = triton_missing()
    if why_not is not None:
        yield lambda: ([], f"{why_not}, so its interpreter cannot run the kernels (it is for Linux only)")
        return
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(CHECK, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:

        def results() -> tuple[list[dict[str, Any]], str | None]:
            out, error = process.communicate()
            if out:
                return json.loads(out)["kernels"], None
            last = (error.strip().splitlines() or ["no message"])[-1]
            return [], f"the kernels did not run in Triton's interpreter: exit code {process.returncode}, {last}"

        try:
            yield results
        finally:
            process.kill()


def _write(out: Path, runs: list[ClipRun], settings: dict[str, Any], missing: Container[str]) -> dict[str, str]:
    """Save the latents, which took the time, then the other files but ``missing``; why those failed that did."""
    from happyhorse_fast.pony.media import contact_sheet, write_mp4

    real_path(out).mkdir(parents=True, exist_ok=True)
    latents = {f"{run.form}.{name}": getattr(run.clip, name) for run in runs for name in ("video", "audio")}
    save_tensors(out / LATENTS, latents, settings)
    shown = next(run for run in runs if run.form == SHOWN).clip
    titled = [replace(run.clip, prompt=f"{run.clip.prompt} ({run.form})") for run in runs]
    writers: dict[str, Callable[[Path], None]] = {
        CLIP: lambda path: write_mp4(path, shown.frames, shown.samples),
        SHEET: lambda path: contact_sheet(titled).savefig(path),
    }
    failed = {}
    for name, write in writers.items():
        if name in missing:
            continue
        try:
            with replacing(out / name) as partial:
                write(partial)
        except Exception as error:  # whatever a codec or a font raises, the rest is still to be saved and shown
            failed[name] = optional.said(error)
    return failed


def _shown(data: dict[str, Any]) -> Shown:
    rows = [
        [
            form["form"],
            f"{form['video_error']:.1e}" if i else "reference",
            f"{form['audio_error']:.1e}" if i else "reference",
            f"{form['psnr_db']:.1f}" if i else "",
            f"{form['seconds']:.2f}",
        ]
        for i, form in enumerate(data["forms"])
    ]
    title = f"{data['prompt']!r}, {data['steps']} steps on the CPU, seed {data['seed']}"
    yield table(title, ["form", "video error", "audio error", "pictures dB", "seconds"], rows)
    yield (
        "error: relative L2 of the latents; pictures: PSNR against the first form. Fast forms run in plain torch "
        "here, with the\nkernels' rounding points (backend reference): their seconds say nothing about a GPU."
    )
    off = [f"{check['op']} {check['variant']}: {check['detail']}" for check in data["kernels"] if not check["passed"]]
    if data["kernels"]:
        count = f"{len(data['kernels'])} kernels and formats in Triton's interpreter, against plain torch:"
        yield literal(count, " ", verdict(not off), *(f" {words}" for words in off))
    else:
        yield literal((data["why_no_kernels"], "yellow"))
    for key, what in (("clip", f"clip with sound ({data['clip_form']})"), ("sheet", "pictures and waveforms")):
        yield data[f"why_no_{key}"] if data[key] is None else f"{what}: {data[key]}"
    yield f"all in {data['seconds']:.0f} s"
