"""Frames and sound into an mp4, encoded in a thread of its own while further frames are made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from queue import Queue
from types import TracebackType
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
QUEUED = 2
"""Calls of ``add`` that wait to be encoded; the next one blocks. A window of 28 frames at 1080p is 175 MB."""
BT709 = 1
"""Number of the colour matrix, primaries and transfer in which players show large pictures that name none."""
LIMITED_RANGE = 1
BIT_RATE = 96_000
"""Of each channel of the sound, bits a second."""


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
        self._queue: Queue[tuple[str, Any] | None] = Queue(QUEUED)
        self._stopped = False
        self._done = threading.Event()
        self._error: Exception | None = None
        self._file = self._encoding()

    def __enter__(self) -> Mp4Writer:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def add(self, frames: torch.Tensor | np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Queue frames for the encoder; returns at once unless :data:`QUEUED` calls are still waiting.

        Args:
            frames: [n, height, width, 3] uint8 in RGB, on the host; not to be changed afterwards.

        Raises:
            OSError: An earlier frame could not be encoded or written.
            TypeError: Not a tensor or array of uint8.
            ValueError: Another shape.
        """
        array = frames.numpy() if isinstance(frames, torch.Tensor) else frames
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            came = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"frames must be a tensor or an array of uint8, got {came}")
        if array.shape[1:] != (*self.size, 3):
            raise ValueError(f"frames must be [n, {self.size[0]}, {self.size[1]}, 3], got {list(array.shape)}")
        self.frames += len(array)
        self._put("frames", array)

    def add_sound(self, samples: torch.Tensor) -> None:
        """Queue the sound, or its next part.

        Args:
            samples: [channels, m], floating point, on the host; cut at -1 and 1.

        Raises:
            OSError: An earlier frame could not be encoded or written.
            ValueError: Another shape.
        """
        if samples.dim() != 2 or len(samples) != self.channels:
            raise ValueError(f"samples must be [{self.channels}, m], got {list(samples.shape)}")
        self._put("sound", np.ascontiguousarray(samples.float().clamp(-1, 1).numpy()))
        self.samples += samples.shape[1]

    @contextmanager
    def _encoding(self) -> Iterator[None]:
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
            threading.Thread(target=self._encode_all, name="mp4", daemon=True).start()
            try:
                try:
                    yield
                except BaseException:
                    self._stopped = True
                    raise
                finally:
                    self._finish()
                self._raise_refused()
                if not self.frames or not self.samples:
                    raise ValueError(f"a film needs frames and sound, got {self.frames} and {self.samples} samples")
            except BaseException:
                with suppress(av.FFmpegError, OSError):
                    self._container.close()
                raise
            with self._refusing():
                self._container.close()

    def _finish(self) -> None:
        """Wait for the thread, which alone may use the encoders; on Ctrl-C no longer than for the frame at hand.

        By an event: an interrupted ``join`` takes a running thread for one that has ended (Python 3.10 to 3.12).
        """
        try:
            self._queue.put(None)
            self._done.wait()
        except BaseException:
            self._stopped = True
            self._queue.put(None)  # a second one is never read
            self._done.wait()
            raise

    def _put(self, kind: str, array: np.ndarray[Any, Any]) -> None:
        self._raise_refused()
        self._queue.put((kind, array))

    def _raise_refused(self) -> None:
        if self._error is not None:
            raise self._refused(self._error) from self._error

    def _refused(self, error: Exception) -> OSError:
        why = getattr(error, "strerror", None) or optional.said(error)
        return OSError(f"{self.path} cannot be written: {why}")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        import av

        try:
            yield
        except (av.FFmpegError, OSError, ValueError) as error:  # the last where a build lacks an encoder
            raise self._refused(error) from error

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
        self._heard = 0

    def _encode_all(self) -> None:
        """In the thread: until None comes. After an error what comes is dropped, so that nobody waits for room."""
        try:
            while (item := self._queue.get()) is not None:
                if self._error is None:
                    self._tried(self._encode, *item)
            if self._error is None and not self._stopped:
                self._tried(self._flush)
        finally:
            self._done.set()

    def _tried(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:  # of whatever kind, it is raised where the frames come from
            self._error = error

    def _flush(self) -> None:
        for stream in (self._video, self._audio):
            self._container.mux(stream.encode())

    def _encode(self, kind: str, array: np.ndarray[Any, Any]) -> None:
        import av

        if kind == "sound":
            sound = av.AudioFrame.from_ndarray(array, format="fltp", layout=LAYOUTS[self.channels])
            sound.sample_rate, sound.pts, sound.time_base = self.sample_rate, self._heard, Fraction(1, self.sample_rate)
            self._heard += array.shape[1]
            self._container.mux(self._audio.encode(sound))
            return
        for picture in array:
            if self._stopped:
                return
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            converted = self._reformatter.reformat(
                frame, format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE
            )
            self._container.mux(self._video.encode(converted))
