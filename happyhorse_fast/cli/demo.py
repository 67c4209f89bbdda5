"""``happyhorse-fast demo``: a seeded tiny model samples a clip in every form there is, error, time and memory apart."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from happyhorse_fast.budgets import measure
from happyhorse_fast.cli.forms import FORMS, Form
from happyhorse_fast.cli.output import JsonOption, emit, gib, replacing, save_tensors, table
from happyhorse_fast.cli.pony_demo import demo_prompt
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.tokens import ClipTokens

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from happyhorse_fast.sampler import StepInfo

CLIP = ClipTokens(T=7, H=16, W=28, audio=25)
"""Latent of the demonstration: 1 s at 24 fps of 448x256 pixels."""
TEXT = 32
LATENTS, PICTURE = "latents.safetensors", "demo.png"


@dataclass
class FormRun:
    """What one form did.

    Attributes:
        form: Its name.
        video: [1, C, T, H, W] final latent.
        audio: [1, A, Ca] final latent.
        video_error: Relative L2 against the first form, after each step.
        audio_error: Likewise.
        seconds: Time of each step.
        peak_bytes: Live tensor bytes at the peak of a forward pass, weights included.
    """

    form: str
    video: torch.Tensor
    audio: torch.Tensor
    seconds: list[float]
    peak_bytes: int
    trajectory: list[tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    video_error: list[float] = field(default_factory=list)
    audio_error: list[float] = field(default_factory=list)


def demo(
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of weights, inputs and noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the latents and the picture; made where needed.")] = Path(
        "happyhorse-demo"
    ),
    prompt: Annotated[
        str | None,
        typer.Option(help='Make a clip with the small trained model, such as "a large red ball bounces twice".'),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Sample a seeded tiny model on the CPU in every form; save the latents and a picture of them.

    The weights are random, so the picture is of numbers, not of horses: what it shows is how close the forms are. With
    --prompt, the small trained model makes a clip with sound instead.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out must be a folder, {out} is a file")
    if prompt is not None:
        with _one_thread():
            demo_prompt(prompt, seed=seed, steps=steps, out=out, as_json=as_json)
        return
    start = time.perf_counter()
    config = ModelConfig.preset("tiny")
    with _one_thread():
        runs = run_forms(config, CLIP, FORMS, text=TEXT, seed=seed, steps=steps)
    seconds = time.perf_counter() - start
    out.mkdir(parents=True, exist_ok=True)
    latents = {
        f"{run.form}.{name}": value for run in runs for name, value in (("video", run.video), ("audio", run.audio))
    }
    save_tensors(out / LATENTS, latents, {"preset": "tiny", "seed": seed, "steps": steps})
    picture, why = _picture(out / PICTURE, runs)
    data = {
        "preset": "tiny",
        "seed": seed,
        "steps": steps,
        "tokens": CLIP.total(TEXT),
        "seconds": seconds,
        "latents": out / LATENTS,
        "picture": picture,
        "why_no_picture": why,
        "forms": [_as_data(run) for run in runs],
    }
    emit(data, as_json, lambda console: _render(console, data))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for a while: on tensors this small several wait for each other, ten times as long on a busy CPU."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_forms(
    config: ModelConfig, clip: ClipTokens, forms: tuple[Form, ...], *, text: int, seed: int, steps: int
) -> list[FormRun]:
    """Sample the same clip from the same weights and noise in several forms, on the CPU.

    Args:
        config: The model.
        clip: Latent size and audio tokens.
        forms: The first is what the others are measured against.
        text: Text tokens.
        seed: Of weights, inputs and noise.
        steps: Denoising steps.
    """
    from happyhorse_fast import golden

    shapes = {
        "in.video": (1, config.latent_channels, clip.T, clip.H, clip.W),
        "in.audio": (1, clip.audio, config.audio_in_channels),
        "in.text": (1, text, config.text_in_channels),
    }
    inputs = [golden.draw(seed, name, shape) for name, shape in shapes.items()]
    runs = [_run_form(form, config, inputs, seed, steps) for form in forms]
    for run in runs:
        for name, errors in (("video", run.video_error), ("audio", run.audio_error)):
            pairs = zip(run.trajectory, runs[0].trajectory, strict=True)
            errors += [measure(*(x[name == "audio"] for x in pair)).relative_l2 for pair in pairs]
    return runs


def _run_form(form: Form, config: ModelConfig, inputs: list[torch.Tensor], seed: int, steps: int) -> FormRun:
    import torch

    from happyhorse_fast import golden
    from happyhorse_fast.model.memory import StorageMeter
    from happyhorse_fast.sampler import sample

    model = form.apply(form.eager(config, "cpu").init_weights(seed))
    meter = StorageMeter()
    meter.register((*model.parameters(), *model.buffers()), "weights")
    meter.register(inputs, "inputs")
    with torch.no_grad(), meter:  # an untimed pass: counting takes time, and the first pass is slower anyway
        model(*inputs)
    seconds: list[float] = []
    trajectory: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(info: StepInfo) -> None:
        seconds.append(info.seconds)
        trajectory.append((info.video.clone(), info.audio.clone()))

    def replay(name: str, shape: torch.Size) -> torch.Tensor:
        return golden.draw(seed, name, shape)

    video, audio = sample(model, *inputs, steps=steps, noise=replay, callback=keep, progress=False)
    return FormRun(form.name, video, audio, seconds, meter.peak_bytes, trajectory)


def _picture(path: Path, runs: list[FormRun]) -> tuple[Path | None, str | None]:
    if importlib.util.find_spec("matplotlib") is None:
        return None, 'no picture: matplotlib is not installed (pip install "happyhorse-fast[plot]")'
    from happyhorse_fast.cli.pictures import draw_runs

    with replacing(path) as partial:
        draw_runs(runs).savefig(partial)
    return path, None


def _as_data(run: FormRun) -> dict[str, Any]:
    return {
        "form": run.form,
        "video_error": run.video_error[-1],
        "audio_error": run.audio_error[-1],
        "seconds_per_step": sum(run.seconds) / len(run.seconds),
        "seconds": sum(run.seconds),
        "peak_memory_bytes": run.peak_bytes,
        "error_by_step": {"video": run.video_error, "audio": run.audio_error},
    }


def _render(console: Console, data: dict[str, Any]) -> None:
    rows = [
        [
            form["form"],
            f"{form['video_error']:.1e}" if i else "reference",
            f"{form['audio_error']:.1e}" if i else "reference",
            f"{form['seconds_per_step']:.3f}",
            f"{form['seconds']:.2f}",
            gib(form["peak_memory_bytes"]),
        ]
        for i, form in enumerate(data["forms"])
    ]
    title = f"tiny model, {data['tokens']:,} tokens, {data['steps']} steps on the CPU, seed {data['seed']}"
    columns = ["form", "video error", "audio error", "s/step", "total s", "peak memory"]
    console.print(table(title, columns, rows))
    console.print(
        "error: relative L2 of the final latent; peak memory: live tensors of a forward pass, weights included"
    )
    console.print(f"latents: {data['latents']}")
    console.print(f"picture: {data['picture']}" if data["picture"] is not None else str(data["why_no_picture"]))
