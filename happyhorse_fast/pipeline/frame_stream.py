"""Layers of the turbo decoder on a stream of frames: each keeps the few frames that its kernel reaches back to.

A layer takes an iterator of chunks and gives one. A chunk is (frames [n, H, W, C], whether they end the window). Frames
are contiguous with the channels last, which is also how cuDNN's tensor-core convolutions read them, and a run of frames
is one block of memory: a normalized chunk is written where the convolution reads it, behind the two frames before it,
so that nothing is padded or transposed by a copy. No tensor of a whole window exists beyond the latents.

A generator keeps its local names while those behind it run, so tensors are handed on without one (``pop``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Chunk = tuple[torch.Tensor, bool]
Write = Callable[[torch.Tensor, torch.Tensor], object]
"""(frames, where their input to a convolution goes), both [n, H, W, C]."""

CHUNK_BYTES = 256 * 2**20
"""Size of a chunk where resolution grows: at 1080p two frames of 128 channels in bf16, a product of a million rows."""
NORM_EPS = 1e-8
SHORTCUT_EPS = 1e-6
ACTIVATIONS: dict[str, Any] = {"relu": torch.ops.aten.relu.out, "silu": torch.ops.aten.silu.out}


def chunk_frames(frame: torch.Tensor, channels: int) -> int:
    """How many frames of that many ``channels``, as large as ``frame`` [H, W, C], make a chunk; at least one."""
    return max(1, CHUNK_BYTES // (frame.shape[0] * frame.shape[1] * channels * frame.element_size()))


def rms_norm(frames: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the channels of [n, H, W, C], in float32, rounded to the frames' dtype."""
    return F.rms_norm(frames, frames.shape[-1:], eps=eps)


def norm_then(activation: str) -> Write:
    """The input of most convolutions: RMS norm, then ``activation``, each rounded to the frames' dtype."""
    return lambda frames, out: ACTIVATIONS[activation](rms_norm(frames, NORM_EPS), out=out)


def as_is(frames: torch.Tensor, out: torch.Tensor) -> None:
    """Frames go into a convolution as they are."""
    out.copy_(frames)


class FrameConv(nn.Module):
    """A convolution over 3 frames; each end of a window repeats its frame, space is padded with zeros."""

    def __init__(self, inputs: int, outputs: int, space: int = 3) -> None:
        super().__init__()
        padding = (0, space // 2, space // 2)
        self.conv = nn.Conv3d(inputs, outputs, (3, space, space), padding=padding, device="meta")

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """[n + 2, H, W, inputs] -> [n, H, W, outputs]."""
        return self.conv(frames.permute(3, 0, 1, 2)[None])[0].permute(1, 2, 3, 0)

    def stream(self, chunks: Iterator[Chunk], write: Write) -> Iterator[Chunk]:
        """As many frames as come, one frame later."""
        before: torch.Tensor | None = None
        for frames, last in chunks:
            reach = 1 if before is None else 2
            count = len(frames)
            block = [frames.new_empty(reach + count + last, *frames.shape[1:])]
            write(frames, block[0][reach : reach + count])
            del frames
            block[0][:reach] = block[0][1:2] if before is None else before
            if last:
                block[0][-1:] = block[0][-2:-1]
            before = block[0][-2:].clone()
            # The last chunk has a frame more for each layer that is a frame behind; it is cut before it grows.
            most = chunk_frames(block[0][0], self.conv.out_channels)
            while len(block[0]) > 2 + most:
                yield self(block[0][: 2 + most]), False
                block[0] = block[0][most:]
            if len(block[0]) > 2:
                yield self(block.pop()), last


class PointConv(nn.Module):
    """A 1x1x1 convolution, which is a product over the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 1, device="meta")

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """[n, H, W, inputs] -> [n, H, W, outputs]."""
        return F.linear(frames, self.conv.weight.flatten(1), self.conv.bias)


class Resnet(nn.Module):
    """Two convolutions, each behind a norm and an activation, plus the input, projected where the channels change."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = FrameConv(inputs, outputs)
        self.conv2 = FrameConv(outputs, outputs)
        self.conv_shortcut = PointConv(inputs, outputs) if inputs != outputs else None

    def stream(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """As many frames as come, two frames later; until then their inputs wait."""
        waiting: deque[torch.Tensor] = deque()

        def keep(chunk: Chunk) -> Chunk:
            frames = chunk[0]
            if self.conv_shortcut is not None:
                frames = self.conv_shortcut(rms_norm(frames, SHORTCUT_EPS))
            waiting.append(frames)
            return chunk

        def add(chunk: Chunk) -> Chunk:
            done = 0
            while done < len(chunk[0]):
                inputs = waiting.popleft()
                count = min(len(inputs), len(chunk[0]) - done)
                chunk[0][done : done + count].add_(inputs[:count])
                if count < len(inputs):
                    waiting.appendleft(inputs[count:])
                done += count
            return chunk

        hidden = self.conv1.stream(map(keep, chunks), norm_then(self.activation))
        return map(add, self.conv2.stream(hidden, norm_then("silu")))


class Upsampler(nn.Module):
    """Twice the height and width, and with ``time`` twice the frames as well."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.time_conv = FrameConv(channels, 2 * channels, space=1) if time else None
        conv = nn.Conv2d(channels, channels, 3, padding=1, device="meta")
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """[n, H, W, C] -> [n, 2 H, 2 W, C]."""
        return self.resample(frames.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def stream(self, chunks: Iterator[Chunk], first: bool) -> Iterator[Chunk]:
        """In chunks of :data:`CHUNK_BYTES`; the first window of a clip loses the first of its doubled frames."""
        if self.time_conv is not None:
            chunks = self.time_conv.stream(chunks, as_is)
        drop = first and self.time_conv is not None
        for frames, last in chunks:
            # Each becomes 4 times the pixels; doubled frames are already among its channels.
            pieces = deque(frames.split(chunk_frames(frames[0], 4 * frames.shape[-1])))
            del frames
            while pieces:
                piece = [pieces.popleft()]
                if self.time_conv is not None:
                    piece = [piece[0].unflatten(-1, (2, -1)).movedim(3, 1).flatten(0, 1)[int(drop) :]]
                    drop = False
                yield self(piece.pop()), last and not pieces


class UpBlock(nn.Module):
    """Channels changed by a resnet of its own, then upsampled, then resnets."""

    def __init__(self, inputs: int, channels: int, depth: int, scales: tuple[bool, bool]) -> None:
        super().__init__()
        space, time = scales
        self.conv_in = Resnet(inputs, channels, "silu") if inputs != channels else None
        self.upsamplers = nn.ModuleList([Upsampler(channels, time=time)] if space else [])
        activation = "relu" if space else "silu"
        self.resnets = nn.ModuleList(Resnet(channels, channels, activation) for _ in range(depth))

    def stream(self, chunks: Iterator[Chunk], first: bool) -> Iterator[Chunk]:
        """``first``: whether the window is a clip's first."""
        if self.conv_in is not None:
            chunks = self.conv_in.stream(chunks)
        for upsampler in self.upsamplers:
            chunks = upsampler.stream(chunks, first)  # type: ignore[operator]
        for resnet in self.resnets:
            chunks = resnet.stream(chunks)  # type: ignore[operator]
        return chunks
