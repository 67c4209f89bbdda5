"""Frames and sound into an mp4."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from happyhorse_fast import optional
from happyhorse_fast.arguments import require_whole
from happyhorse_fast.files import replacing

VIDEO_CODEC, SOUND_CODEC = "libx264", "aac"
SAME_BYTES = {"mbtree": "0"}
"""Without x264's macroblock tree the same frames give the same bytes, whatever the number of its threads; with it
(x264 165) even one thread gave 2 to 8 different films of the same 40 frames in 8 runs."""
LAYOUTS = {1: "mono", 2: "stereo"}
BT709 = 1
"""Number of the colour matrix, primaries and transfer in which players show large pictures that name none."""
LIMITED_RANGE = 1
BIT_RATE = 96_000
"""Of each channel of the sound, bits a second."""


def require_mp4(path: Path) -> None:
    """Raise ValueError where a name says that the file is of another kind of media: what is written is an mp4."""
    kind = mimetypes.guess_type(path.name)[0] or ""
    if kind.startswith(("video/", "audio/", "image/")) and kind != "video/mp4":
        raise ValueError(f"out must end with .mp4, for that is what is written; got {path}")


class Mp4Writer:
    """An H.264 film with AAC sound; a context manager, at whose end the file is there, whole, or not at all.

    Frames and sound may come in any order; a film needs both. Colours are converted by BT.709 and tagged so: an
    untagged file, as the published code writes it by BT.601, shows in other colours where players take it for BT.709.

    Args:
        path: The file, replaced if it is there.
        width: Columns of a frame, even.
        height: Rows of a frame, even.
        fps: Frames per second.
        sample_rate: Of the sound, in Hz.
        crf: x264's constant rate factor, 0 (lossless) to 51; 10 is imageio's ``quality=8``, which the published code
            asks for.
        channels: Of the sound, 1 or 2.

    Raises:
        ImportError: PyAV is not installed or does not import; on entering.
        OSError: The file cannot be written; on entering, adding or leaving.
        ValueError: An argument is out of bounds; on leaving: frames or sound are missing.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: int = 25,
        sample_rate: int = 44_100,
        crf: int = 10,
        channels: int = 2,
    ) -> None:
        self.path = Path(path)
        self.size = require_whole("height", height, 2), require_whole("width", width, 2)
        if height % 2 or width % 2:
            raise ValueError(f"height and width must be even, as H.264 stores colours by 2 x 2, got {height} x {width}")
        self.fps, self.sample_rate = require_whole("fps", fps, 1), require_whole("sample_rate", sample_rate, 1)
        self.crf, self.channels = require_whole("crf", crf, 0, 51), require_whole("channels", channels, 1, 2)
        self.frames = 0
        """How many came so far."""
        self.samples = 0
        self._file = self._opened()

    def __enter__(self) -> Mp4Writer:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def add(self, frames: torch.Tensor | np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Encode frames. What a GPU was given to do before, it does meanwhile.

        Args:
            frames: [n, height, width, 3] uint8 in RGB, on the host.

        Raises:
            OSError: They cannot be encoded or written.
            TypeError: Not a tensor or array of uint8.
            ValueError: Another shape.
        """
        array = frames.numpy() if isinstance(frames, torch.Tensor) else frames
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            came = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"frames must be a tensor or an array of uint8, got {came}")
        if array.shape[1:] != (*self.size, 3):
            raise ValueError(f"frames must be [n, {self.size[0]}, {self.size[1]}, 3], got {list(array.shape)}")
        import av

        with self._refusing():
            for picture in array:
                frame = self._reformatter.reformat(
                    av.VideoFrame.from_ndarray(picture, format="rgb24"),
                    format="yuv420p",
                    dst_colorspace=BT709,
                    dst_color_range=LIMITED_RANGE,
                )
                self._container.mux(self._video.encode(frame))
        self.frames += len(array)

    def add_sound(self, samples: torch.Tensor) -> None:
        """Encode the sound, or its next part.

        Args:
            samples: [channels, m], floating point, on the host; cut at -1 and 1.

        Raises:
            OSError: It cannot be encoded or written.
            ValueError: Another shape.
        """
        if samples.dim() != 2 or len(samples) != self.channels:
            raise ValueError(f"samples must be [{self.channels}, m], got {list(samples.shape)}")
        import av

        array = np.ascontiguousarray(samples.float().clamp(-1, 1).numpy())
        with self._refusing():
            sound = av.AudioFrame.from_ndarray(array, format="fltp", layout=LAYOUTS[self.channels])
            sound.sample_rate, sound.time_base = self.sample_rate, Fraction(1, self.sample_rate)
            sound.pts = self.samples
            self._container.mux(self._audio.encode(sound))
        self.samples += samples.shape[1]

    @contextmanager
    def _opened(self) -> Iterator[None]:
        optional.require("av", "writing a clip")
        import av

        with replacing(self.path, end=".mp4") as partial:
            with self._refusing():
                # The index in front, so that a film plays while it is loaded; and packets wait until both streams have
                # some, so that frames that come before the sound are still stored beside it.
                options = {"movflags": "+faststart", "max_interleave_delta": "0"}
                partial.touch()  # PyAV opens it with the first packet, after minutes of work
                self._container = av.open(str(partial), "w", format="mp4", options=options)
                self._add_streams()
            try:
                yield
                if not self.frames or not self.samples:
                    raise ValueError(f"a film needs frames and sound, got {self.frames} and {self.samples} samples")
                with self._refusing():
                    for stream in (self._video, self._audio):
                        self._container.mux(stream.encode())
            except BaseException:
                with suppress(av.FFmpegError, OSError):
                    self._container.close()
                raise
            with self._refusing():
                self._container.close()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        import av

        try:
            yield
        except (av.FFmpegError, OSError, ValueError) as error:  # the last where a build lacks an encoder
            why = getattr(error, "strerror", None) or optional.said(error)
            raise OSError(f"{self.path} cannot be written: {why}") from error

    def _add_streams(self) -> None:
        import av.video.reformatter

        self._video: Any = self._container.add_stream(
            VIDEO_CODEC, rate=self.fps, options={"crf": str(self.crf), **SAME_BYTES}
        )
        self._video.height, self._video.width = self.size
        self._video.pix_fmt = "yuv420p"
        coder = self._video.codec_context
        coder.colorspace = coder.color_primaries = coder.color_trc = BT709
        coder.color_range = LIMITED_RANGE
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._audio: Any = self._container.add_stream(SOUND_CODEC, rate=self.sample_rate, layout=LAYOUTS[self.channels])
        # At FFmpeg's 128 kb/s a quiet side beside a loud one has 21 dB to the noise, at 192 kb/s 28 dB; AAC allows no
        # more than 6 bits a sample.
        self._audio.bit_rate = self.channels * min(BIT_RATE, 6 * self.sample_rate)
