"""The data set: a ball that falls and bounces, drawn and sounded on the fly from a few numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from happyhorse_fast.pony.codec import FPS, FRAME_SAMPLES, FRAMES, SAMPLE_RATE, SIDE, LinearCodec
from happyhorse_fast.pony.measure import COLUMN, FLOOR_ROW, PITCH, RADIUS, RGB, background
from happyhorse_fast.pony.prompt import Prompt

EDGE = 3.0
"""Pixels over which a ball's edge fades: sharper ones need more channels than the published latent has."""
FIRST_IMPACT = {1: (20.0, 26.0), 2: (12.0, 14.0), 3: (9.0, 9.8)}
"""Frames until the first impact, by number of bounces; with RESTITUTION no further impact falls into the clip."""
RESTITUTION = {1: 0.86, 2: 0.86, 3: 0.88}
"""Speed after an impact by speed before it."""
DROP = {1: 62.0, 2: 56.0, 3: 48.0}
"""Pixels that a ball falls at first, by number of bounces."""
ATTACK, DECAY = 0.004, 0.10
"""Seconds in which an impact's tone rises, and in which it falls to 1/e."""


@dataclass(frozen=True)
class Scene:
    """One clip.

    Attributes:
        prompt: Size, colour and number of bounces (its place may be open).
        column: Of the ball's centre, in pixels.
        drop: Pixels that the ball falls until its first impact.
        first_impact: Its time, in frames.
    """

    prompt: Prompt
    column: float
    drop: float
    first_impact: float

    def impacts(self) -> list[float]:
        """Times of the impacts, in frames."""
        times, flight = [self.first_impact], 2 * self.first_impact
        for _ in range(self.prompt.count - 1):
            flight *= RESTITUTION[self.prompt.count]
            times.append(times[-1] + flight)
        return times

    def height(self) -> torch.Tensor:
        """[FRAMES] pixels between ball and floor."""
        t = torch.arange(FRAMES, dtype=torch.float32)
        gravity = 2 * self.drop / self.first_impact**2
        height = self.drop - gravity / 2 * t**2
        speed = gravity * self.first_impact
        for impact in self.impacts():
            speed *= RESTITUTION[self.prompt.count]
            since = t - impact
            height = torch.where(since > 0, speed * since - gravity / 2 * since**2, height)
        return height


def draw_scene(prompt: Prompt, rng: random.Random) -> Scene:
    """A clip that ``prompt`` describes; ``rng`` gives what it leaves open."""
    place = prompt.place or rng.choice(tuple(COLUMN))
    return Scene(
        prompt,
        column=COLUMN[place] + rng.uniform(-5.0, 5.0),
        drop=DROP[prompt.count] * rng.uniform(0.92, 1.08),
        first_impact=rng.uniform(*FIRST_IMPACT[prompt.count]),
    )


def render_video(scenes: list[Scene]) -> torch.Tensor:
    """[B, FRAMES, SIDE, SIDE, 3] float32 in 0..1."""
    radius = torch.tensor([RADIUS[s.prompt.size] for s in scenes])[:, None, None, None]
    height = torch.stack([s.height() for s in scenes])[:, :, None, None]
    column = torch.tensor([s.column for s in scenes])[:, None, None, None]
    colour = torch.tensor([RGB[s.prompt.colour] for s in scenes])[:, None, None, None]
    place = torch.arange(SIDE) + 0.5
    rows = place[:, None] - (FLOOR_ROW - radius - height)
    distance = torch.hypot(rows, place[None, :] - column)
    cover = ((radius - distance) / EDGE + 0.5).clamp(0, 1)
    cover = (cover * cover * (3 - 2 * cover)).unsqueeze(-1)
    shade = 1 - 0.35 * (distance / radius).square().unsqueeze(-1).clamp(max=1)
    return torch.lerp(background(), colour * shade, cover)


def render_audio(scenes: list[Scene]) -> torch.Tensor:
    """[B, FRAMES * FRAME_SAMPLES] float32: an oscillator per clip, opened by each impact in proportion to speed."""
    seconds = torch.arange(FRAMES * FRAME_SAMPLES) / SAMPLE_RATE
    tracks = []
    for scene in scenes:
        envelope = torch.zeros_like(seconds)
        for bounce, impact in enumerate(scene.impacts()):
            since = (seconds - impact / FPS).clamp(min=0)
            strength = RESTITUTION[scene.prompt.count] ** bounce
            envelope += 0.6 * strength * (1 - torch.exp(-since / ATTACK)) * torch.exp(-since / DECAY)
        tracks.append(envelope * torch.sin(2 * torch.pi * PITCH[scene.prompt.size] * seconds))
    return torch.stack(tracks)


def encode_audio(codec: LinearCodec, samples: torch.Tensor) -> torch.Tensor:
    """[B, frames * FRAME_SAMPLES] in -1..1 -> [B, frames, 64]."""
    return codec.encode(samples.unflatten(1, (-1, FRAME_SAMPLES)))
