"""A clip as one sequence of tokens: order, patches, coordinates, and which tokens a local layer attends to.

The order is video (T, H/2, W/2 row-major), audio, text. All shapes use T, H, W for the latent, A for audio tokens,
L for text tokens, V = T * H/2 * W/2 and N = V + A + L.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_finite, require_tensor
from happyhorse_fast.config import PATCH, CoordsStyle, ModelConfig
from happyhorse_fast.parallel.rows import RowShare


class Clip(NamedTuple):
    """Token grid of one clip.

    Attributes:
        frames: Latent frames T.
        rows: Token rows H / 2.
        columns: Token columns W / 2.
        audio: Audio tokens A.
        text: Text tokens L.
    """

    frames: int
    rows: int
    columns: int
    audio: int
    text: int

    @property
    def frame_tokens(self) -> int:
        """Video tokens per latent frame."""
        return self.rows * self.columns

    @property
    def video(self) -> int:
        """Video tokens V."""
        return self.frames * self.frame_tokens

    @property
    def total(self) -> int:
        """All tokens N."""
        return self.video + self.audio + self.text

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Where video, audio and text start, and the end."""
        return 0, self.video, self.video + self.audio, self.total

    def slices(self) -> tuple[slice, slice, slice]:
        """Rows of video, audio and text."""
        bounds = self.bounds
        return slice(bounds[0], bounds[1]), slice(bounds[1], bounds[2]), slice(bounds[2], bounds[3])


def held_tokens(clip: Clip, share: RowShare) -> Clip:
    """The rows that a rank holds, as a clip of one row of video tokens; dummies at the end count as text."""
    audio, text = (min(max(start - share.first, 0), share.count) for start in clip.bounds[1:3])
    return Clip(1, 1, audio, text - audio, share.count - text)


def check_inputs(config: ModelConfig, video: object, audio: object, text: object, device: torch.device) -> Clip:
    """Hold a clip's tensors against the model, and give its token grid.

    Args:
        config: The model's configuration.
        video: [1, C, T, H, W] floating point; H and W even.
        audio: [1, A, Ca] floating point.
        text: [1, L, Ct] floating point.
        device: Where the model is.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Wrong rank, channels, device, an empty dimension, odd H or W, or one audio or text token where the
            coordinate style has no scale for it.
        NonFiniteError: NaN or Inf in an input.
    """
    video = require_tensor("video", video, (1, config.latent_channels, "T", "H", "W"), device=device)
    audio = require_tensor("audio", audio, (1, "A", config.audio_in_channels), device=device)
    text = require_tensor("text", text, (1, "L", config.text_in_channels), device=device)
    _, _, frames, height, width = video.shape
    for axis, size, patch in (("H", height, PATCH[1]), ("W", width, PATCH[2])):
        if size % patch:
            raise ValueError(f"video must have an even {axis} (patches are 1x2x2), got {list(video.shape)}")
    for name, value in (("video", video), ("audio", audio), ("text", text)):
        require_finite(name, value)
    sizes = (frames, height // PATCH[1], width // PATCH[2], audio.shape[1], text.shape[1])
    # Whole numbers, whatever traces this call: torch.jit.trace has tensors for sizes, torch.compile unknowns.
    clip = Clip(*[len(range(size)) for size in sizes])
    check_time_axis(clip, config.coords_style)
    return clip


def check_time_axis(clip: Clip, style: CoordsStyle) -> None:
    """Raise where audio or text has one token but a reference grid of several: there is no scale for that.

    Raises:
        ValueError: Style ``"v1"`` with one text token, or with one audio token beside several latent frames.
    """
    if style != "v1":
        return
    if clip.audio == 1 and clip.frames > 1:
        raise ValueError(
            f'audio must have at least 2 tokens where coords_style is "v1" and video has T={clip.frames} latent frames '
            "(scale (T-1)/(A-1)); got 1"
        )
    if clip.text == 1:
        raise ValueError('text must have at least 2 tokens where coords_style is "v1" (scale 1/(L-1)); got 1')


def patchify(video: torch.Tensor) -> torch.Tensor:
    """[1, C, T, H, W] -> [V, C*4]; a token's channels are ordered (C, pT, pH, pW), as an unfold gives them."""
    _, c, t, h, w = video.shape
    x = video.reshape(c, t, h // 2, 2, w // 2, 2)
    return x.permute(1, 2, 4, 0, 3, 5).reshape(t * (h // 2) * (w // 2), c * 4)


def unpatchify(tokens: torch.Tensor, clip: Clip) -> torch.Tensor:
    """[V, 4*C] -> [1, C, T, H, W]; the model's *output* channels are ordered (pT, pH, pW, C), unlike its input's."""
    x = tokens.reshape(clip.frames, clip.rows, clip.columns, 2, 2, -1)
    return x.permute(5, 0, 1, 3, 2, 4).reshape(1, -1, clip.frames, clip.rows * 2, clip.columns * 2)


def pack_tokens(video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The packed form the public implementation takes: [N, max channels], narrower modalities padded with zeros."""
    parts = [patchify(video), audio[0], text[0]]
    width = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])


def modality_of_tokens(clip: Clip) -> torch.Tensor:
    """[N] int64: 0 video, 1 audio, 2 text."""
    return torch.arange(3).repeat_interleave(torch.tensor([clip.video, clip.audio, clip.text]))


@ambient.independent
def coordinates(clip: Clip, style: CoordsStyle, device: torch.device | None = None) -> torch.Tensor:
    """Nine float32 coordinates per token: (t, h, w), its grid (T, H, W), and a reference grid (rT, rH, rW).

    Args:
        clip: The token grid.
        style: ``"v2"``: audio at fractional times of the video's axis by its own length, text at t = -L..-1.
            ``"v1"``: audio stretched over the video's T frames, text at t = 0..L-1 stretched over 2.
        device: Where to make them.

    Returns:
        [N, 9].

    Raises:
        ValueError: As :func:`check_time_axis`.
    """
    check_time_axis(clip, style)
    grid = (clip.frames, clip.rows, clip.columns)
    if style == "v2":
        audio_reference, text_reference, text_start = (clip.audio - 1) // 4 + 1, 1, -clip.text
    else:
        audio_reference, text_reference, text_start = clip.frames, 2, 0

    def block(sizes: tuple[int, int, int], reference: tuple[int, int, int], start: int = 0) -> torch.Tensor:
        t, h, w = (torch.arange(n, dtype=torch.float32, device=device) for n in sizes)
        place = torch.stack(torch.meshgrid(t + start, h, w, indexing="ij"), dim=-1).reshape(-1, 3)
        meta = torch.tensor([*sizes, *reference], dtype=torch.float32, device=device)
        return torch.cat([place, meta.expand(len(place), 6)], dim=1)

    return torch.cat(
        [
            block(grid, grid),
            block((clip.audio, 1, 1), (audio_reference, 1, 1)),
            block((clip.text, 1, 1), (text_reference, 1, 1), text_start),
        ]
    )


Ranges = list[tuple[int, int, int, int]]
"""Rows (q_start, q_end, k_start, k_end), half open; rows that share queries add up to one softmax over the union."""


def dense_ranges(clip: Clip) -> Ranges:
    """Every token attends to every token."""
    return [(0, clip.total, 0, clip.total)]


def local_ranges(clip: Clip, receptive_field: int) -> Ranges:
    """A local layer: frame f sees frames f-R..f+R, audio and text; audio and text see everything.

    In the public implementation's order: one range per frame, video to audio and text, audio and text to all.
    """
    per = clip.frame_tokens
    windows: Ranges = [
        (f * per, (f + 1) * per, max(f - receptive_field, 0) * per, min(f + receptive_field + 1, clip.frames) * per)
        for f in range(clip.frames)
    ]
    return [*windows, (0, clip.video, clip.video, clip.total), (clip.video, clip.total, 0, clip.total)]


def row_chunks(clip: Clip, experts: int, size: int) -> Iterator[tuple[int, slice]]:
    """(expert, rows) in sequence order, at most ``size`` rows each and never across a modality with experts."""
    spans = list(clip.slices()) if experts > 1 else [slice(0, clip.total)]
    for expert, span in enumerate(spans):
        for start in range(span.start, span.stop, size):
            yield expert, slice(start, min(start + size, span.stop))
