"""What is asked of one run: checked settings, and the sizes and rates that follow from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from happyhorse_fast.arguments import require_choice, require_whole
from happyhorse_fast.pipeline.layout import FIRST_STAGES, SECOND_STAGES
from happyhorse_fast.pipeline.negative_prompt import NEGATIVE_PROMPT
from happyhorse_fast.tokens import ClipTokens, tokens_for

FPS = 25
"""Frames per second that the public weights mean: an audio latent stands for 2,048 samples at 51,200 Hz."""
SMALL = "256p"
"""Resolution of the first of two stages."""
TEXT, IMAGE, SOUND = "text", "image", "sound"
DENOISED, RESOLVED = "denoise", "super-resolve"
AUDIO, VIDEO = "decode audio", "decode video"
"""Names of the stages, in order."""
MAX_SEED = 2**63 - 1
NOISES = ("device", "cpu")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of one clip. Immutable and checked.

    Attributes:
        prompt: What to show and to sound.
        negative_prompt: What not to, of the base model; None for the default.
        seconds: Whole seconds, 3 to 15.
        resolution: ``"1080p"``, ``"540p"`` or, in one stage, ``"256p"``.
        aspect: ``"16:9"``, ``"9:16"`` or ``"1:1"``.
        stages: 2: a small clip first, then the size asked for; 1: the size asked for at once.
        first: Model of the first stage: ``"distilled"`` (8 steps) or ``"base"`` (32 steps with guidance).
        seed: Of all noise.
        noise: Where noise is drawn: ``"device"``, as the public implementation does, or ``"cpu"``, alike on any device.
        image: Whether the first picture is given.
        sound: Whether the sound is given.

    Raises:
        TypeError, ValueError: A setting is of a wrong type or not among the allowed values.
    """

    prompt: str
    negative_prompt: str | None = None
    seconds: int = 5
    resolution: str = "1080p"
    aspect: str = "16:9"
    stages: int = 2
    first: str = "distilled"
    seed: int = 42
    noise: str = "device"
    image: bool = False
    sound: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if text is None and name == "negative_prompt":
                continue
            if not isinstance(text, str):
                raise TypeError(f"{name} must be text, got {text!r} of type {type(text).__name__}")
            if not text.strip():
                raise ValueError(f"{name} must say something, got {text!r}")
        object.__setattr__(self, "stages", require_whole("stages", self.stages, 1, 2))
        object.__setattr__(self, "seed", require_whole("seed", self.seed, 0, MAX_SEED))
        for name, allowed in (("first", tuple(FIRST_STAGES)), ("noise", NOISES)):
            require_choice(name, getattr(self, name), allowed)
        tokens_for(self.resolution, self.aspect, self.seconds, FPS)
        object.__setattr__(self, "seconds", int(self.seconds))
        if self.stages == 2 and self.resolution not in SECOND_STAGES:
            raise ValueError(
                f"resolution of two stages must be one of {', '.join(SECOND_STAGES)}, got {self.resolution!r}; "
                f"stages=1 makes {self.resolution}"
            )
        if self.negative_prompt is not None and self.first != "base":
            raise ValueError(
                f'negative_prompt must come with first="base": the distilled model takes none; got first={self.first!r}'
            )

    @property
    def audio_tokens(self) -> int:
        """Audio latents: 25 a second, and one more where the sound is made too."""
        return FPS * self.seconds + (0 if self.sound else 1)

    @property
    def latent_frames(self) -> int:
        """T of the video latent."""
        return (self.audio_tokens - 1) // 4 + 1

    @property
    def frames(self) -> int:
        """Frames of the decoded clip."""
        return 4 * self.latent_frames - 3

    @property
    def first_tokens(self) -> ClipTokens:
        """Sizes of the first stage."""
        return self._tokens(SMALL if self.stages == 2 else self.resolution)

    @property
    def last_tokens(self) -> ClipTokens:
        """Sizes of the clip that is decoded."""
        return self._tokens(self.resolution)

    @property
    def models(self) -> list[str]:
        """Parts that denoise, in order."""
        second = [SECOND_STAGES[self.resolution]] if self.stages == 2 else []
        return [FIRST_STAGES[self.first], *second]

    @property
    def prompts(self) -> list[str]:
        """Prompts that are encoded: what is asked for and, of the base model, what it is guided away from."""
        return [self.prompt, *([self.negative_prompt or NEGATIVE_PROMPT] if self.first == "base" else [])]

    @property
    def parts(self) -> dict[str, str]:
        """Stage -> the part that it loads, in order."""
        return {
            TEXT: "text_encoder",
            **({IMAGE: "image_encoder"} if self.image else {}),
            **({SOUND: "audio_encoder"} if self.sound else {}),
            **dict(zip((DENOISED, RESOLVED), self.models, strict=False)),
            AUDIO: "audio_decoder",
            VIDEO: "video_decoder",
        }

    def _tokens(self, resolution: str) -> ClipTokens:
        tokens = tokens_for(resolution, self.aspect, self.seconds, FPS)
        return tokens._replace(T=self.latent_frames, audio=self.audio_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``Request(**d)`` takes it back."""
        return dataclasses.asdict(self)


def require_rate(fps: object) -> None:
    """Raise a ValueError for another rate than the public weights mean."""
    if fps != FPS:
        raise ValueError(
            f"fps must be {FPS}: the public weights mean {FPS} frames and 51,200 audio samples a second, and play "
            f"too fast or too slow at another rate; got {fps!r}"
        )
