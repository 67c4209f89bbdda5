"""What a run makes: frames and sound, in memory or in a file already."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from happyhorse_fast.files import require_target
from happyhorse_fast.pipeline.latents import Latents
from happyhorse_fast.pipeline.memory_plan import PipelinePlan
from happyhorse_fast.pipeline.mp4 import Mp4Writer, require_mp4
from happyhorse_fast.pipeline.progress import StageCost
from happyhorse_fast.pipeline.request import FPS, Request
from happyhorse_fast.pipeline.sound import PLAYED_RATE


@dataclass(frozen=True)
class Clip:
    """Frames with sound.

    Attributes:
        request: What was asked for.
        frames: [n, H, W, 3] uint8 on the CPU; None where they went straight to the file ``path``.
        samples: [2, m] float32 in about -1..1 on the CPU.
        latents: Video [1, 48, T, H, W] and audio [1, A, 64] that they were decoded from, with the text's embedding.
        stages: What each stage took, in order.
        placing: What stayed on the device, and in which pieces the rest was there.
        path: The file that was written while the frames were decoded, or None.
        fps: Frames per second.
        sample_rate: Samples per second.
    """

    request: Request
    frames: torch.Tensor | None = field(repr=False)
    samples: torch.Tensor = field(repr=False)
    latents: Latents = field(repr=False)
    stages: tuple[StageCost, ...]
    placing: PipelinePlan = field(repr=False)
    path: Path | None = None
    fps: int = FPS
    sample_rate: int = PLAYED_RATE

    @property
    def seconds(self) -> float:
        """Time that the stages took."""
        return sum(cost.seconds for cost in self.stages)

    @property
    def peak_bytes(self) -> int | None:
        """Largest peak of a stage; None where it is not known."""
        return max((cost.peak_bytes for cost in self.stages if cost.peak_bytes is not None), default=None)

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path:
        """Write an mp4 with H.264 video and AAC sound, whole or not at all.

        Args:
            path: Where to.
            overwrite: Replace a file that is there.

        Returns:
            ``path``.

        Raises:
            FileExistsError, FileNotFoundError, OSError: It cannot be written.
            ImportError: PyAV is not installed or does not import.
            ValueError: The frames went straight to a file, which :attr:`path` names; or ``path`` names another format.
        """
        if self.frames is None:
            raise ValueError(
                f"the frames of this clip went straight to {self.path}; make it without out=... to keep them"
            )
        target = Path(path)
        require_mp4(target)
        require_target(target, overwrite)
        count, height, width, _ = self.frames.shape
        with Mp4Writer(target, width, height, fps=self.fps, sample_rate=self.sample_rate) as writer:
            for start in range(0, count, FPS):
                writer.add(self.frames[start : start + FPS])
            writer.add_sound(self.samples)
        return target
