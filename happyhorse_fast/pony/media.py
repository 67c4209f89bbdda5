"""Pictures in; a clip out as an mp4 with sound (both extra ``video``) and as a contact sheet (extra ``plot``)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from happyhorse_fast import ambient, optional
from happyhorse_fast.pipeline.image import open_image
from happyhorse_fast.pipeline.mp4 import Mp4Writer
from happyhorse_fast.pony.codec import FPS, SAMPLE_RATE, SIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from happyhorse_fast.pony.generate import PonyClip


@ambient.independent
def read_image(path: Path) -> torch.Tensor:
    """The middle square of a picture as viewers show it, scaled to the pony's size.

    Turned as its EXIF orientation says, or a film's display matrix; what is transparent is white.

    Args:
        path: A PNG, a JPEG, or what else Pillow or FFmpeg decodes; of a film, its first picture. A FIFO is read to its
            end.

    Returns:
        [128, 128, 3] float32 in 0..1, as :func:`happyhorse_fast.pony.encode_image` takes it.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Pillow, or for a film PyAV, is not installed or does not import.
        ValueError: Not a picture.
    """
    optional.require("PIL", "reading a picture")
    from PIL import Image, ImageOps

    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"image must be a file, {path} is none")
    content = path.read_bytes()  # once: a FIFO gives it once
    try:
        upright = open_image(Image.open(io.BytesIO(content)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # a film, or unknown to Pillow
        upright = open_image(_first_picture(content, path))
    square = ImageOps.fit(upright, (SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(square).astype(np.float32) / 255)


def _first_picture(content: bytes, path: Path) -> NDArray[np.uint8]:
    """[H, W, 4] of what FFmpeg decodes, upright."""
    optional.require("av", "reading a picture")
    import av

    try:
        with av.open(io.BytesIO(content), metadata_errors="ignore") as container:
            frame = next(container.decode(video=0))
            return np.rot90(frame.to_ndarray(format="rgba"), round(frame.rotation / 90))
    except (av.FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(f"image must be a picture such as a PNG or JPEG, {path} is not: {error}") from error


def write_mp4(path: Path, frames: torch.Tensor, samples: torch.Tensor, *, scale: int = 4) -> None:
    """Write H.264 video and AAC sound.

    Args:
        path: Ends with ``.mp4``.
        frames: [F, H, W, 3] in 0..1, at 24 per second.
        samples: [F * 500] in -1..1, at 12 kHz.
        scale: Every pixel becomes scale x scale pixels, so that players need not enlarge it.

    Raises:
        ImportError: PyAV is not installed or does not import.
        OSError: The file cannot be written.
    """
    pictures = (frames * 255).round().byte().repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    _, height, width, _ = pictures.shape
    with Mp4Writer(path, width, height, fps=FPS, sample_rate=SAMPLE_RATE, crf=16, channels=1) as film:
        film.add(pictures)
        film.add_sound(samples[None])


def contact_sheet(clips: list[PonyClip], *, pictures: int = 13) -> Figure:
    """Clips one below the other: pictures from start to end, with the waveform under them on the same time axis.

    Raises:
        ImportError: matplotlib is not installed or does not import.
    """
    optional.require("matplotlib", "a contact sheet")
    from matplotlib.figure import Figure

    width, wave, title = 12.7, 0.45, 0.22  # inches
    step = width / pictures + wave + title + 0.28
    page = (width + 0.3, step * len(clips) + 0.1)
    figure = Figure(figsize=page, dpi=110, facecolor="white")

    def panel(top: float, height: float) -> Axes:
        return figure.add_axes((0.15 / page[0], 1 - (top + height) / page[1], width / page[0], height / page[1]))

    for i, clip in enumerate(clips):
        above = panel(i * step + title, width / pictures)
        below = panel(i * step + title + width / pictures, wave)
        last = len(clip.frames) - 1
        chosen = torch.linspace(0, last, pictures).round().long()
        seconds_of = np.linspace(0, last / FPS, pictures)
        half = last / FPS / (pictures - 1) / 2  # seconds; a picture's moment is at the middle of its width
        span = (-half, last / FPS + half)
        above.imshow(torch.cat(list(clip.frames[chosen]), dim=1).numpy(), extent=(*span, 0, 1), aspect="auto")
        above.set_title(clip.prompt, loc="left", fontsize=9, pad=3)
        for second in seconds_of[:-1] + half:
            above.axvline(second, color="white", linewidth=1.5)
        above.set_axis_off()
        seconds = np.arange(len(clip.samples)) / SAMPLE_RATE
        below.plot(seconds, clip.samples.numpy(), linewidth=0.4, color="#1f6feb")
        below.set(xlim=span, ylim=(-1, 1), yticks=[])
        below.tick_params(labelsize=6, pad=1)
        for side in ("top", "left", "right"):
            below.spines[side].set_visible(False)
    return figure
