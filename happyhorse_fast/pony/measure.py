"""Read a clip's colour, size, place and impacts from its pixels and samples alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from happyhorse_fast import ambient
from happyhorse_fast.pony.codec import FRAME_SAMPLES, SAMPLE_RATE, SIDE
from happyhorse_fast.pony.prompt import Prompt

RADIUS = {"large": 23.0, "medium": 15.0, "small": 9.0}
"""Pixels that the grammar's sizes stand for."""
PITCH = {"large": 312.0, "medium": 624.0, "small": 1248.0}
"""Hz that they do; multiples of the frame rate, so that an oscillator has the same phase at every frame."""
RGB = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.75, 0.15, 0.80),
    "white": (0.97, 0.97, 0.97),
}
COLUMN = {"on the left": 36.0, "in the middle": 64.0, "on the right": 92.0}
"""Pixels from the left."""
FLOOR_ROW = 112
"""Pixels from the top."""
_WALL, _FLOOR = (0.10, 0.11, 0.14), (0.38, 0.36, 0.34)
BALL_CONTRAST = 0.25
"""Distance in RGB from the background at which a pixel counts as ball; ringing of the codec stays below it."""
MIN_RISE = 8.0
"""Pixels that a ball must have come down before an impact, and must rise after it."""
REACH = 14.0
"""Pixels from the floor within which a turning point is an impact and not a flaw of the motion."""
SYNC_FRAMES = 2.0


@dataclass(frozen=True)
class Measured:
    """Properties found in one clip; None where there is no ball or no sound.

    Attributes:
        colour: Nearest named colour.
        size: Nearest named size.
        place: Nearest named place.
        seen: Times of impacts in the picture, in frames.
        heard: Times of impacts in the sound, in frames.
        pitch: Size that the strongest frequency stands for.
    """

    colour: str | None
    size: str | None
    place: str | None
    seen: list[float]
    heard: list[float]
    pitch: str | None

    @property
    def sync_error(self) -> float | None:
        """Largest shift, in frames, between an impact's picture and its sound; None unless as many are heard."""
        return largest_shift(self.seen, self.heard) if self.seen else None

    @property
    def in_sync(self) -> bool:
        """Whether impacts are seen, as many are heard, and each within SYNC_FRAMES of its own."""
        error = self.sync_error
        return error is not None and error <= SYNC_FRAMES


def largest_shift(times: list[float], others: list[float]) -> float | None:
    """Largest difference between impacts of the same place in two lists, in frames; None where their numbers differ."""
    if len(times) != len(others):
        return None
    return max((abs(a - b) for a, b in zip(times, others, strict=True)), default=0.0)


def judge(prompt: Prompt, found: Measured) -> dict[str, bool]:
    """Tell by criterion whether the clip is as ``prompt`` asks; ``sync`` is impacts heard within 2 frames of seen ones.

    A place that the prompt leaves open counts as right.
    """
    right = {
        "colour": found.colour == prompt.colour,
        "size": found.size == prompt.size,
        "bounces": len(found.seen) == prompt.count,
        "sync": found.in_sync,
        "pitch": found.pitch == prompt.size,
        "place": found.place is not None and prompt.place in (None, found.place),
    }
    return right | {"all": all(right.values())}


def background() -> torch.Tensor:
    """[SIDE, SIDE, 3] float32 in 0..1: wall and floor."""
    picture = torch.tensor(_WALL).expand(SIDE, SIDE, 3).clone()
    picture[FLOOR_ROW:] = torch.tensor(_FLOOR)
    return picture


@ambient.independent
def measure(frames: torch.Tensor, samples: torch.Tensor) -> Measured:
    """Read one clip.

    Args:
        frames: [FRAMES, SIDE, SIDE, 3] in 0..1.
        samples: [FRAMES * FRAME_SAMPLES] in -1..1.
    """
    ball = (frames - background()).norm(dim=-1) > BALL_CONTRAST
    area = ball.sum(dim=(1, 2)).float()
    heard = heard_impacts(samples)
    pitch = nearest_pitch(samples) if heard else None
    if area.median() < 30:
        return Measured(None, None, None, [], heard, pitch)
    place = torch.arange(ball.shape[1]) + 0.5
    rows = (ball.sum(dim=2) * place).sum(dim=1) / area.clamp(min=1)
    columns = (ball.sum(dim=1) * place).sum(dim=1) / area.clamp(min=1)
    radius = math.sqrt(float(area.median()) / math.pi)
    mean = frames[ball].mean(dim=0)
    seen = seen_impacts((FLOOR_ROW - radius - rows).tolist())
    return Measured(
        # By direction: shading does not count.
        colour=max(RGB, key=lambda name: float(cosine_similarity(mean, torch.tensor(RGB[name]), dim=0))),
        size=min(RADIUS, key=lambda name: abs(math.log(RADIUS[name] / radius))),
        place=min(COLUMN, key=lambda name: abs(COLUMN[name] - float(columns.median()))),
        seen=seen,
        heard=heard,
        pitch=pitch,
    )


def seen_impacts(heights: list[float]) -> list[float]:
    """Find the frames at which a ball turns upwards within REACH of the floor, having fallen and rising by MIN_RISE."""
    found: list[float] = []
    low, low_at, high, falling = math.inf, 0, -math.inf, True
    for frame, height in enumerate(heights):
        if falling:
            high = max(high, height)
            if height < low:
                low, low_at = height, frame
            if height > low + MIN_RISE:
                if low < REACH and high > low + MIN_RISE and low_at > 0:
                    found.append(float(low_at))
                falling, high = False, height
        else:
            high = max(high, height)
            if height < high - MIN_RISE:
                falling, low, low_at = True, height, frame
    return found


def heard_impacts(samples: torch.Tensor) -> list[float]:
    """Find the frames at which the sound's level, in windows of an eighth of a frame, jumps up."""
    window = FRAME_SAMPLES // 8
    level = samples[: len(samples) // window * window].unflatten(0, (-1, window)).square().mean(dim=1).sqrt()
    level = torch.nn.functional.avg_pool1d(level[None], 3, stride=1, padding=1)[0].tolist()
    loud = 0.2 * max(level)
    found: list[float] = []
    if max(level) < 0.05:
        return found
    for i in range(4, len(level)):
        jump = level[i] - min(level[max(i - 6, 0) : i])
        if jump > loud and (not found or i / 8 - found[-1] > 3):
            found.append((i - 1) / 8)
    return found


def nearest_pitch(samples: torch.Tensor) -> str:
    """Find the size whose tone is nearest to the strongest frequency."""
    power = torch.fft.rfft(samples).abs()
    strongest = max(float(power[1:].argmax() + 1) * SAMPLE_RATE / len(samples), 1.0)
    return min(PITCH, key=lambda name: abs(math.log(PITCH[name] / strongest)))
