"""Sound files into the rate of the audio latents, and from it to that of players."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from happyhorse_fast import optional
from happyhorse_fast.arguments import require_tensor, require_whole

SAMPLE_RATE = 51_200
"""What a second of audio latents stands for: 25 latents of 2048 samples. Public weights know no other."""
LATENT_SAMPLES = 2048
PLAYED_RATE = 44_100
"""Of the sound of finished clips, as the public implementation saves it."""


def resample(sound: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Resample by the Fourier transform, as ``scipy.signal.resample`` does: what is above the new rate is cut off.

    Args:
        sound: [..., n], a floating-point dtype, on any device; taken as one period.
        count: Samples of the result; by default from 51,200 to 44,100 Hz, int(n * 441 / 512).

    Returns:
        [..., count] in the dtype of ``sound``, computed in float64.

    Raises:
        TypeError: ``sound`` is no floating-point tensor, or ``count`` no whole number.
        ValueError: Nothing is there, or ``count`` is below 1.
    """
    require_tensor("sound", sound, [f"d{index}" for index in range(max(sound.dim(), 1))])
    there = sound.shape[-1]
    wanted = there * 441 // 512 if count is None else count
    require_whole("count", wanted, 1)
    spectrum = torch.fft.rfft(sound.double())
    kept = min(there, wanted)
    spectrum = spectrum[..., : kept // 2 + 1].clone()
    if kept % 2 == 0 and wanted != there:
        # The highest frequency stands for two, of which one end has both and the other one.
        spectrum[..., -1] *= 2 if wanted < there else 0.5
    return (torch.fft.irfft(spectrum, n=wanted) * (wanted / there)).to(sound.dtype)


def read_sound(path: str | Path, seconds: float | None = None) -> torch.Tensor:
    """The sound of a file, mixed to mono and resampled by FFmpeg, in 16 bits as the published code reads it.

    Args:
        path: A sound file or a film of any format that FFmpeg decodes; a FIFO is read to its end.
        seconds: How much of it at most; all of it by default.

    Returns:
        [samples] float32 at 51,200 Hz, -1 to 1.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: PyAV is not installed or does not import.
        ValueError: Not a file with sound, or its sound is damaged or empty.
    """
    optional.require("av", "reading a sound")
    import av

    file = Path(path)
    if not file.exists() or file.is_dir():
        raise FileNotFoundError(f"audio must be a file, {file} is none")
    most = None if seconds is None else int(seconds * SAMPLE_RATE)
    pieces: list[np.ndarray[tuple[int, ...], np.dtype[np.int16]]] = []
    count = 0
    try:
        # Read once: a FIFO gives it once. Tags are not read, and in a WAV they may be in any encoding.
        with av.open(io.BytesIO(file.read_bytes()), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise ValueError(f"audio must be a file with sound, {file} has none")
            for piece in _resampled(container.decode(audio=0)):
                pieces.append(piece)
                count += len(piece)
                if most is not None and count >= most:
                    break
    except (av.FFmpegError, IndexError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"audio must be a sound file such as a WAV or MP3, {file} is not: {why}") from error
    if not count:
        raise ValueError(f"audio must have sound, that of {file} is empty")
    return torch.from_numpy(np.concatenate(pieces)[:most].astype(np.float32) / 32768)


def _resampled(frames: Iterable[Any]) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.int16]]]:
    """Mono pieces of a stream at 51,200 Hz; each run of frames of one kind has a resampler, which takes no other."""
    import av

    kind = attrgetter("format.name", "layout.name", "sample_rate")
    for _, alike in groupby(frames, kind):
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        for frame in chain(alike, [None]):
            yield from (made.to_ndarray()[0] for made in resampler.resample(frame))
