"""``happyhorse-fast demo --prompt``: the small trained model makes a clip with sound, eager beside fast."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from happyhorse_fast.budgets import measure
from happyhorse_fast.cli.forms import FORMS, Form
from happyhorse_fast.cli.output import emit, replacing, save_tensors, table

if TYPE_CHECKING:
    from rich.console import Console

    from happyhorse_fast.pony import PonyClip

CLIP = "clip.mp4"
SHEET = "clip.png"
LATENTS = "clip.safetensors"


@dataclass
class ClipRun:
    """A clip as one form made it.

    Attributes:
        form: Its name.
        clip: Pictures, sound and latents.
        seconds: Of sampling and decoding.
        video_error: Relative L2 of the video latent to the first form's.
        audio_error: Of the audio latent.
        psnr_db: Of the pictures against the first form's; None for that one.
    """

    form: str
    clip: PonyClip
    seconds: float
    video_error: float = 0.0
    audio_error: float = 0.0
    psnr_db: float | None = None


def demo_prompt(prompt: str, *, seed: int, steps: int, out: Path, as_json: bool) -> None:
    """Make the clip in every form; save it as mp4, its contact sheet and latents.

    Args:
        prompt: In the grammar of :mod:`happyhorse_fast.pony.prompt`.
        seed: Of all noise.
        steps: Denoising steps.
        out: Folder to write to.
        as_json: Print one JSON document.

    Raises:
        ValueError: The prompt is not in the grammar; the message gives it.
        ImportError: PyAV or matplotlib is not installed.
    """
    from happyhorse_fast.pony.media import contact_sheet, write_mp4

    runs = make_clips(prompt, FORMS, seed=seed, steps=steps)
    shown = next(run for run in runs if run.form == "fast bfloat16")  # exact; fp8 is beside it in the sheet
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / CLIP) as partial:
        write_mp4(partial, shown.clip.frames, shown.clip.samples)
    titled = [replace(run.clip, prompt=f"{run.clip.prompt} ({run.form})") for run in runs]
    with replacing(out / SHEET) as partial:
        contact_sheet(titled).savefig(partial)
    latents = {f"{run.form}.{name}": getattr(run.clip, name) for run in runs for name in ("video", "audio")}
    save_tensors(out / LATENTS, latents, {"prompt": prompt, "seed": seed, "steps": steps})
    data = {
        "prompt": prompt,
        "seed": seed,
        "steps": steps,
        "clip": out / CLIP,
        "clip_form": shown.form,
        "sheet": out / SHEET,
        "latents": out / LATENTS,
        "forms": [
            {
                "form": run.form,
                "video_error": run.video_error,
                "audio_error": run.audio_error,
                "psnr_db": run.psnr_db,
                "seconds": run.seconds,
            }
            for run in runs
        ],
    }
    emit(data, as_json, lambda console: _render(console, data))


def make_clips(prompt: str, forms: tuple[Form, ...], *, seed: int, steps: int) -> list[ClipRun]:
    """The same clip, from the same noise, in several forms; the first is what the others are measured against."""
    import torch

    from happyhorse_fast.pony import generate, load_model

    runs: list[ClipRun] = []
    for form in forms:
        model = form.apply(load_model(torch.float32 if form.precision == "fp32" else torch.bfloat16))
        start = time.perf_counter()
        clip = generate(model, prompt, seed=seed, steps=steps)
        run = ClipRun(form.name, clip, time.perf_counter() - start)
        if runs:
            first = runs[0].clip
            run.video_error = measure(clip.video, first.video).relative_l2
            run.audio_error = measure(clip.audio, first.audio).relative_l2
            mean = float((clip.frames - first.frames).square().mean())
            run.psnr_db = -10 * math.log10(mean) if mean else math.inf
        runs.append(run)
    return runs


def _render(console: Console, data: dict[str, Any]) -> None:
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
    console.print(table(title, ["form", "video error", "audio error", "pictures dB", "seconds"], rows))
    console.print("error: relative L2 of the latents; pictures: PSNR against the first form")
    console.print(f"clip with sound ({data['clip_form']}): {data['clip']}\npictures and waveforms: {data['sheet']}")
