"""Small pictures of latents while they are denoised: one linear map from a latent's channels to a colour."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from happyhorse_fast import ambient, optional
from happyhorse_fast.arguments import require_tensor, require_whole
from happyhorse_fast.config import LATENT_CHANNELS
from happyhorse_fast.files import replacing
from happyhorse_fast.pipeline.host_frames import VideoDecoder
from happyhorse_fast.pipeline.tiling import SPACE_SCALE
from happyhorse_fast.pipeline.turbo import to_uint8

BLOCK = 3
"""Side of an area of equal latents, of which the middle one is seen: areas of a picture are flat, too."""
GRID = 6
"""Areas along each side of a decoded frame: 288 x 288 pixels."""
ROUNDS = 4
"""Frames: 144 colours for the 49 unknowns of each."""


@dataclass(frozen=True)
class Preview:
    """The map; :func:`fit_preview` finds one.

    Attributes:
        weight: [48, 3] float32 on the CPU.
        bias: [3] float32 on the CPU.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def picture(self, latents: torch.Tensor, *, scale: int = 1) -> torch.Tensor:
        """The colours of the middle latent frame.

        Args:
            latents: [1, 48, T, H, W] as the sampler has them, on any device.
            scale: Pixels per latent in height and width, blended; 16 is the size of the clip.

        Returns:
            [scale H, scale W, 3] uint8 on the CPU.

        Raises:
            TypeError: ``latents`` is no floating-point tensor, or ``scale`` no whole number.
            ValueError: A wrong shape, or ``scale`` is below 1.
        """
        require_tensor("latents", latents, (1, LATENT_CHANNELS, "T", "H", "W"))
        colours = latents[0, :, latents.shape[2] // 2].float().cpu().movedim(0, -1) @ self.weight + self.bias
        size = require_whole("scale", scale, 1)
        if size > 1:
            wide = F.interpolate(colours.movedim(-1, 0)[None], scale_factor=size, mode="bicubic")
            colours = wide[0].movedim(0, -1)
        return to_uint8(colours)

    def save(self, path: str | Path, latents: torch.Tensor, *, scale: int = 4) -> None:
        """Write :meth:`picture` as a PNG, whole or not at all.

        Raises:
            ImportError: Pillow is not installed or does not import.
            OSError: The file cannot be written.
            TypeError: As :meth:`picture`.
            ValueError: Likewise.
        """
        optional.require("PIL", "a preview")
        from PIL import Image

        pixels = self.picture(latents, scale=scale).numpy()
        with replacing(Path(path), end=".png") as partial:
            Image.fromarray(pixels).save(partial, format="png")


@ambient.independent
@torch.no_grad()
def fit_preview(decoder: VideoDecoder, device: torch.device | str = "cpu") -> Preview:
    """Find the map of a decoder by least squares over the colours that it makes of random flat areas.

    Every area is of one latent, its channels normal as those of clips are on average. Always the same areas. With the
    published turbo decoder four single frames of 288 x 288 pixels are decoded, 28 TFLOP.

    Args:
        decoder: Of the latents.
        device: Where it is.

    Raises:
        RuntimeError: The decoder gives no finite colours.
    """
    generator = torch.Generator().manual_seed(0)
    areas = torch.randn(ROUNDS, GRID, GRID, LATENT_CHANNELS, generator=generator)
    seen = []
    for area in areas:
        spread = area.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
        latents = spread.permute(2, 0, 1)[None, :, None].to(device)
        frame = torch.cat(list(decoder.windows(latents)), dim=2)[0, :, 0].float().cpu()
        blocks = frame.unflatten(1, (GRID, BLOCK, SPACE_SCALE)).unflatten(4, (GRID, BLOCK, SPACE_SCALE))
        inner = blocks[:, :, BLOCK // 2, :, :, BLOCK // 2]
        seen.append(inner.mean(dim=(2, 4)).movedim(0, -1))
    inputs, colours = areas.flatten(0, 2).double(), torch.stack(seen).flatten(0, 2).double()
    if not bool(torch.isfinite(colours).all()):
        raise RuntimeError("the decoder must give finite colours, some of random latents are NaN or Inf")
    known = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(known, colours).solution
    return Preview(solution[:-1].float(), solution[-1].float())
