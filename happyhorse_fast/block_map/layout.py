"""Where a clip's tokens lie in the sequence, and the frame window over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from happyhorse_fast.arguments import require_whole
from happyhorse_fast.block_map.bits import BLOCK


@dataclass(frozen=True)
class Layout:
    """Slots of one clip: T frames of video, then audio, then text, with padding where something is aligned.

    Args:
        frames: Latent frames T.
        frame_tokens: Video tokens per frame.
        audio: Audio tokens.
        text: Text tokens.
        align_frames: Every frame starts on a multiple of 128 slots (2040 tokens take 2048 slots).
        align_modalities: Audio, text and what follows start on a multiple of 128 slots.

    Raises:
        TypeError: A size is no whole number.
        ValueError: A size is negative.
    """

    frames: int
    frame_tokens: int
    audio: int
    text: int
    align_frames: bool = False
    align_modalities: bool = False

    def __post_init__(self) -> None:
        for name in ("frames", "frame_tokens", "audio", "text"):
            object.__setattr__(self, name, require_whole(name, getattr(self, name), 0))

    @property
    def frame_slots(self) -> int:
        """Slots per frame."""
        return _up(self.frame_tokens, self.align_frames)

    @property
    def audio_start(self) -> int:
        """First audio slot: the end of the video's slots."""
        return _up(self.frames * self.frame_slots, self.align_modalities)

    @property
    def text_start(self) -> int:
        """First text slot."""
        return _up(self.audio_start + self.audio, self.align_modalities)

    @property
    def slots(self) -> int:
        """All slots, padding included."""
        return _up(self.text_start + self.text, self.align_modalities)

    def frame_spans(self) -> list[tuple[int, int]]:
        """Slots (start, end) of every frame's tokens, padding left out."""
        starts = (f * self.frame_slots for f in range(self.frames))
        return [(start, start + self.frame_tokens) for start in starts]

    def prefix_spans(self) -> list[tuple[int, int]]:
        """Slots of the audio and of the text tokens."""
        return [(self.audio_start, self.audio_start + self.audio), (self.text_start, self.text_start + self.text)]


def _up(size: int, align: bool) -> int:
    return -(-size // BLOCK) * BLOCK if align else size


Pairs = list[tuple[int, int]]


def frame_window(layouts: Layout | Sequence[Layout], receptive_field: int | None) -> tuple[Pairs, Pairs, int]:
    """Ranges of queries, the ranges of keys that they see, and the slots of :meth:`BlockMap.frame_window`.

    Padding slots are never keys. As queries they share their frame's keys, so that alignment makes no block partial
    along the queries; nobody reads their result.
    """
    layouts = [layouts] if isinstance(layouts, Layout) else layouts
    if not isinstance(layouts, (list, tuple)) or not all(isinstance(layout, Layout) for layout in layouts):
        raise TypeError(f"layouts must be a Layout or a list of them, got {layouts!r}")
    if not layouts:
        raise ValueError("layouts must name at least one clip, got none")
    if receptive_field is not None:
        receptive_field = require_whole("receptive_field", receptive_field, 0)
    queries: Pairs = []
    keys: Pairs = []
    origin = 0
    for layout in layouts:
        video, prefix = layout.frame_spans(), layout.prefix_spans()
        rows = [((layout.audio_start, layout.slots), video + prefix)]
        if receptive_field is None:
            rows.append(((0, layout.audio_start), video + prefix))
        else:
            for f in range(layout.frames):
                window = video[max(f - receptive_field, 0) : f + receptive_field + 1]
                rows.append(((f * layout.frame_slots, (f + 1) * layout.frame_slots), window + prefix))
        for (q0, q1), spans in rows:
            queries += [(origin + q0, origin + q1)] * len(spans)
            keys += [(origin + k0, origin + k1) for k0, k1 in spans]
        origin += layout.slots
    return queries, keys, origin
