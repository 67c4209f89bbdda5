"""Sound files for tests of what reads one."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def write_sine(path: Path, rate: int) -> Path:
    """Write four seconds of a sine, mono, 16 bits; gives the path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        wave = (np.sin(np.arange(4 * rate) / 20) * 9000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux([*stream.encode(frame), *stream.encode()])
    return path
