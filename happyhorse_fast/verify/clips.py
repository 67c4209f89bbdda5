"""The small model's clip of one prompt and one noise, in every form of the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from happyhorse_fast.budgets import measure
from happyhorse_fast.pony import PonyClip, encode_image, generate, load_model
from happyhorse_fast.pony.metrics import psnr
from happyhorse_fast.verify.forms import Form


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


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for a while: on tensors this small several wait for each other, ten times as long on a busy CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def make_clips(
    prompt: str, forms: Sequence[Form], *, seed: int, steps: int, picture: torch.Tensor | None = None
) -> list[ClipRun]:
    """Make the same clip, from the same noise, in several forms; the others are measured against the first.

    Args:
        prompt: In the grammar of :mod:`happyhorse_fast.pony.prompt`.
        forms: How to run the model.
        seed: Of all noise.
        steps: Denoising steps.
        picture: [128, 128, 3] in 0..1, the first picture.
    """
    first_picture = None if picture is None else encode_image(picture)
    runs: list[ClipRun] = []
    for form in forms:
        model = form.apply(load_model(torch.float32 if form.precision == "fp32" else torch.bfloat16))
        start = time.perf_counter()
        clip = generate(model, prompt, seed=seed, steps=steps, image=first_picture)
        run = ClipRun(form.name, clip, time.perf_counter() - start)
        if runs:
            first = runs[0].clip
            run.video_error = measure(clip.video, first.video).relative_l2
            run.audio_error = measure(clip.audio, first.audio).relative_l2
            run.psnr_db = float(psnr(first.frames[None], clip.frames[None]))
        runs.append(run)
    return runs
