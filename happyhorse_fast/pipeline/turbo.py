"""The turbo video decoder: latents into frames, in the published windows, one chunk of frames at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from happyhorse_fast import ambient
from happyhorse_fast.arguments import CheckpointError, listed, require_tensor, require_whole
from happyhorse_fast.config import LATENT_CHANNELS
from happyhorse_fast.pipeline import tiling
from happyhorse_fast.pipeline.codec_files import differences
from happyhorse_fast.pipeline.frame_stream import Chunk, FrameConv, Resnet, UpBlock, as_is, norm_then

PATCH = 2
"""Pixels in height and width that one position of the last convolution holds."""
SCALES = ((True, True), (True, True), (True, False), (False, False))
"""Of each up block: whether it doubles height and width, and whether it doubles the frames."""
# Of the Wan 2.2 latents, per channel.
# fmt: off
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


class _Decoder(nn.Module):
    """The layers under their published names."""

    def __init__(self, channels: list[int], depths: list[int]) -> None:
        super().__init__()
        middle, *rest = channels
        self.conv_in = FrameConv(LATENT_CHANNELS, middle)
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList(Resnet(middle, middle, "silu") for _ in range(depths[0]))
        self.up_blocks = nn.ModuleList(
            UpBlock(inputs, outputs, depth, scales)
            for inputs, outputs, depth, scales in zip(channels, rest, depths[1:], SCALES, strict=False)
        )
        self.conv_out = FrameConv(rest[-1], 3 * PATCH**2)

    def stream(self, latents: torch.Tensor, first: bool) -> Iterator[torch.Tensor]:
        """Latents [n, H, W, 48] of a window -> its frames in order, some at a time, each [3, some, 16 H, 16 W]."""
        chunks: Iterator[Chunk] = self.conv_in.stream(iter([(latents, True)]), as_is)
        for resnet in self.mid_block.resnets:  # type: ignore[union-attr]
            chunks = resnet.stream(chunks)
        for block in self.up_blocks:
            chunks = block.stream(chunks, first)  # type: ignore[operator]
        return (_unpatchify(frames) for frames, _ in self.conv_out.stream(chunks, norm_then("silu")))


class TurboDecoder(nn.Module):
    """The published decoder of 107 M parameters; :meth:`from_tensors` makes one.

    Its layers pass on a few frames at a time (``frame_stream.py``), which changes no result: at 1080p and in bf16 a
    window peaks at 9.1 GB, weights and frames included, where tensors of whole windows take 22.2. docs/DECODER.md has
    FLOPs and bytes of each stage.
    """

    def __init__(self, channels: list[int], depths: list[int]) -> None:
        super().__init__()
        self.decoder = _Decoder(channels, depths)

    @classmethod
    @ambient.makes_tensors
    def from_tensors(cls, tensors: Mapping[str, Any]) -> TurboDecoder:
        """A decoder of the checkpoint's weights, in their dtype and on their device.

        Args:
            tensors: By the published keys ``decoder.*``, or with ``module.`` before them; or the whole checkpoint,
                which holds these below ``ema_state_dict``. Other parts than the decoder are left out. Channels and
                the number of resnets are those of the tensors.

        Raises:
            CheckpointError: A key of the decoder is missing, unknown, there twice, or of another shape or dtype than
                the rest asks for; it is a ValueError and names the key.
        """
        weights = _decoder_weights(tensors)
        channels, depths = _sizes(weights)
        decoder = cls(channels, depths).requires_grad_(False)
        wanted = decoder.state_dict()
        problems = differences(wanted, weights, "the decoder")
        first = "decoder.conv_in.conv.weight"
        dtype = weights[first].dtype
        dtypes = {key: weights[key].dtype for key in wanted.keys() & weights.keys()}
        strange = {key: came for key, came in dtypes.items() if came != dtype or not dtype.is_floating_point}
        problems += [f"{key} is {came}, {first} is {dtype}; floats of one dtype" for key, came in strange.items()]
        if problems:
            raise CheckpointError(f"turbo decoder: {listed(sorted(problems))}")
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        ready = {k: w.contiguous(memory_format=formats.get(w.dim(), torch.preserve_format)) for k, w in weights.items()}
        decoder.load_state_dict(ready, assign=True)
        return decoder.eval()

    def decode(self, latents: torch.Tensor, tiles: int = 1) -> torch.Tensor:
        """All frames of a clip: those of :meth:`windows`, joined.

        Args:
            latents: [1, 48, T, H, W], a floating-point dtype, on the decoder's device.
            tiles: As in :meth:`windows`.

        Returns:
            [1, 3, 4 T - 3, 16 H, 16 W] in the weights' dtype, about -1 to 1, not clamped.

        Raises:
            TypeError: ``latents`` is no floating-point tensor, or ``tiles`` no whole number.
            ValueError: A wrong shape or device; a grid of so many tiles does not fit.
        """
        return torch.cat(list(self.windows(latents, tiles)), dim=2)

    def windows(self, latents: torch.Tensor, tiles: int = 1) -> Iterator[torch.Tensor]:
        """The frames of a clip window by window, so that some can leave the device while the next are decoded.

        Args:
            latents: [1, 48, T, H, W], a floating-point dtype, on the decoder's device.
            tiles: Parts of a frame that are decoded one after another, as a grid. The result is the same but for the
                rounding of products of another size. Each tile decodes 15 latents around it as well: less memory,
                more work.

        Returns:
            An iterator; each item is a tensor of its own, [1, 3, frames, 16 H, 16 W] in the weights' dtype: first 25
            frames, then 28 each, at last what is left. About -1 to 1, not clamped.

        Raises:
            TypeError: ``latents`` is no floating-point tensor, or ``tiles`` no whole number.
            ValueError: A wrong shape or device; a grid of so many tiles does not fit. All of them before any work.
        """
        require_tensor("latents", latents, (1, LATENT_CHANNELS, "T", "H", "W"), device=self._weight.device)
        _, _, count, height, width = latents.shape
        grid = tiling.space_tiles(height, width, require_whole("tiles", tiles, 1))
        ready = self._unnormalized(latents)
        return (self._window(ready, window, grid) for window in tiling.time_windows(count))

    @property
    def _weight(self) -> torch.Tensor:
        return self.decoder.conv_in.conv.weight

    @torch.no_grad()
    def _unnormalized(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, 48, T, H, W] -> latents of the autoencoder, [T, H, W, 48], by a product in float32."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (LATENT_MEAN, LATENT_STD)
        )
        return (latents.float() * std + mean).to(self._weight.dtype)[0].permute(1, 2, 3, 0).contiguous()

    @ambient.independent
    @torch.no_grad()
    def _window(self, latents: torch.Tensor, window: tiling.TimeWindow, grid: list[tiling.Tile]) -> torch.Tensor:
        height, width = latents.shape[1:3]
        there = latents[window.start : window.stop]
        missing = window.stop - window.start - len(there)
        there = torch.cat([there, latents[-1:].expand(missing, -1, -1, -1)])
        scale = tiling.SPACE_SCALE
        out = latents.new_empty(1, 3, window.frames, scale * height, scale * width)
        for rows, columns in grid:
            at = -window.skip
            for frames in self.decoder.stream(there[:, rows.outer, columns.outer].contiguous(), window.first):
                begin, end = max(at, 0), min(at + frames.shape[1], window.frames)
                if begin < end:
                    kept = frames[:, begin - at : end - at, rows.inner_pixels, columns.inner_pixels]
                    out[0, :, begin:end, rows.pixels, columns.pixels] = kept
                at += frames.shape[1]
                del frames
                if at >= window.frames:
                    break  # What is behind is padding or the next window's, and is never computed.
        return out


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames of about -1 to 1, any shape, as uint8: (x / 2 + 0.5) 255 in float32, clamped to 0..255, truncated.

    As the published code does it; 1.0 becomes 255, 0.0 becomes 127.
    """
    return (frames.float() / 2).add_(0.5).clamp_(0, 1).mul_(255).to(torch.uint8)


def _unpatchify(frames: torch.Tensor) -> torch.Tensor:
    """[n, H, W, (colour, column, row)] -> [3, n, 2 H, 2 W]."""
    n, height, width, _ = frames.shape
    patches = frames.unflatten(-1, (3, PATCH, PATCH)).permute(3, 0, 1, 5, 2, 4)
    return patches.reshape(3, n, PATCH * height, PATCH * width)


def _decoder_weights(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The decoder's tensors by their published keys."""
    inside = tensors.get("ema_state_dict", tensors)
    found: dict[str, torch.Tensor] = {}
    for key, tensor in inside.items():
        name = key.removeprefix("module.")
        if not name.startswith("decoder."):
            continue
        if name in found:
            raise CheckpointError(f"turbo decoder: {name} is there twice, with and without 'module.' before it")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"turbo decoder: {key} must be a tensor, got {type(tensor).__name__}")
        found[name] = tensor
    return found


def _sizes(weights: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """(channels, numbers of resnets) of the middle and of each up block."""

    def channels(key: str) -> int:
        if key not in weights or weights[key].dim() == 0:
            raise CheckpointError(f"turbo decoder: {key} is missing or has no dimensions; needed for the channels")
        return len(weights[key])

    def depth(block: str) -> int:
        indices = (re.match(rf"{re.escape(block)}\.resnets\.(\d+)\.", key) for key in weights)
        # A number beyond that of all tensors is not believed: it is reported as an unknown key.
        return 1 + max((int(match[1]) for match in indices if match and int(match[1]) < len(weights)), default=0)

    blocks = [f"decoder.up_blocks.{index}" for index in range(len(SCALES))]
    return (
        [channels("decoder.conv_in.conv.weight"), *(channels(f"{b}.resnets.0.conv1.conv.weight") for b in blocks)],
        [depth(block) for block in ("decoder.mid_block", *blocks)],
    )
