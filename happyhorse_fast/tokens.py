"""How many tokens a clip has: from resolution, aspect ratio, length and frame rate to latent sizes."""

from __future__ import annotations

from typing import NamedTuple

from happyhorse_fast.arguments import real_number, require_choice
from happyhorse_fast.config import PATCH, ModelConfig

VAE_STRIDE = (4, 16, 16)
"""Frames, rows and columns of pixels per latent position."""
TEXT_TOKENS = 640
"""Length that the published pipeline pads prompts to."""

SIDES = {"1080p": (1088, 1920), "540p": (512, 896), "256p": (256, 448)}
"""(short side, long side) in pixels; multiples of 32, so that a 1x2x2 patch of a stride-16 latent always fits."""
ASPECTS = ("16:9", "9:16", "1:1")
_FPS = (24, 25)
PUBLIC = "davinci-magihuman"
"""First word of the presets of the public checkpoints."""
SECONDS = range(3, 16)
"""Lengths that a clip may have."""


def fps_of(preset: str | None) -> int:
    """Frames per second that the weights of a preset mean: 25 of the public checkpoints; 24 of the rest, or of none."""
    return 25 if preset is not None and preset.startswith(PUBLIC) else 24


class ClipTokens(NamedTuple):
    """Latent size of a clip.

    Attributes:
        T: Latent frames.
        H: Latent rows (pixels / 16).
        W: Latent columns (pixels / 16).
        audio: Audio tokens, one per video frame.
    """

    T: int
    H: int
    W: int
    audio: int

    @property
    def frame_tokens(self) -> int:
        """Video tokens per latent frame."""
        return (self.H // PATCH[1]) * (self.W // PATCH[2])

    @property
    def video(self) -> int:
        """Video tokens of the clip."""
        return self.T // PATCH[0] * self.frame_tokens

    @property
    def pixels(self) -> tuple[int, int]:
        """(rows, columns) of the decoded frames."""
        return self.H * VAE_STRIDE[1], self.W * VAE_STRIDE[2]

    def total(self, text: int = TEXT_TOKENS) -> int:
        """Tokens of the whole sequence with ``text`` text tokens."""
        return self.video + self.audio + text

    def shapes(self, config: ModelConfig, text: int = TEXT_TOKENS) -> dict[str, tuple[int, ...]]:
        """Shapes of a model's inputs: ``video`` [1, C, T, H, W], ``audio`` [1, A, Ca], ``text`` [1, L, Ct]."""
        return {
            "video": (1, config.latent_channels, self.T, self.H, self.W),
            "audio": (1, self.audio, config.audio_in_channels),
            "text": (1, text, config.text_in_channels),
        }


def tokens_for(resolution: str, aspect: str = "16:9", seconds: int = 5, fps: int = 24) -> ClipTokens:
    """Latent size and token counts of a clip.

    Args:
        resolution: ``"1080p"`` (1920x1088 pixels at 16:9), ``"540p"`` (896x512) or ``"256p"`` (448x256).
        aspect: ``"16:9"``, ``"9:16"``, or ``"1:1"`` (both sides are the short one).
        seconds: Whole seconds, 3 to 15; of any type, as for ``fps``.
        fps: 24 or 25 frames per second.

    Returns:
        ``(T, H, W, audio)`` with frames = seconds * fps + 1, T = (frames - 1) // 4 + 1 and one audio token per frame.

    Raises:
        ValueError: An argument is not among the allowed values; the message lists them.
    """
    require_choice("resolution", resolution, SIDES)
    require_choice("aspect", aspect, ASPECTS)
    length, rate = real_number(seconds), real_number(fps)
    if length is None or length not in SECONDS:
        raise ValueError(f"seconds must be a whole number from {SECONDS[0]} to {SECONDS[-1]}; got {seconds!r}")
    if rate is None or rate not in _FPS:
        raise ValueError(f"fps must be one of {', '.join(map(str, _FPS))}; got {fps!r}")
    short, long = SIDES[resolution]
    rows, columns = {"16:9": (short, long), "9:16": (long, short), "1:1": (short, short)}[aspect]
    frames = int(length) * int(rate) + 1
    return ClipTokens((frames - 1) // VAE_STRIDE[0] + 1, rows // VAE_STRIDE[1], columns // VAE_STRIDE[2], audio=frames)
