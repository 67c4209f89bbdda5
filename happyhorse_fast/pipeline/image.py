"""A picture into the pixels of a clip's first frame."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from happyhorse_fast import optional
from happyhorse_fast.arguments import require_whole
from happyhorse_fast.config import PATCH
from happyhorse_fast.tokens import VAE_STRIDE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image


CHANNELS = (1, 3, 4)
SEVERAL_ARE_ONE = ("MPO",)
"""Formats whose further pictures are views of the first: what many phones write as JPEG."""
_HIGH_16 = {"I;16", "I;16L", "I;16B", "I;16N"}
"""Pillow's modes of 16-bit grey, which it would cut at 255 instead of scaling."""


def open_image(image: str | Path | Image | NDArray[np.uint8]) -> Image:
    """A picture as viewers show it, in RGB.

    Turned as EXIF says; what is transparent is white (the published code shows the colour that hides there).

    Args:
        image: A file of any format that Pillow reads, a FIFO included; a picture of Pillow's; or an array
            [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, the last with opacity.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Pillow is not installed or does not import.
        TypeError: ``image`` is something else.
        ValueError: The file is no picture, is damaged, of float32 or holds several; the array is of another kind.
    """
    optional.require("PIL", "reading a picture")
    from PIL import Image, ImageOps, UnidentifiedImageError

    name, given = "the picture", image
    if isinstance(given, str | Path):
        name, path = str(given), Path(given)
        if not path.exists() or path.is_dir():
            raise FileNotFoundError(f"image must be a file, {path} is none")
    elif isinstance(given, np.ndarray):
        given = _from_array(given)
    elif not isinstance(given, Image.Image):
        raise TypeError(f"image must be a path, Pillow's picture or an array of uint8, got {type(given).__name__}")
    try:
        # Read once: a FIFO gives it once.
        found = given if isinstance(given, Image.Image) else Image.open(io.BytesIO(path.read_bytes()))
        found.load()
        count = getattr(found, "n_frames", 1)
        upright = found
        with contextlib.suppress(SyntaxError, struct.error):  # EXIF that is damaged says nothing
            upright = ImageOps.exif_transpose(found)
    except UnidentifiedImageError as error:
        raise ValueError(f"image must be a picture such as a PNG or JPEG, {name} is not") from error
    except (OSError, RuntimeError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image must be a picture such as a PNG or JPEG, {name} is damaged: {error}") from error
    if count > 1 and found.format not in SEVERAL_ARE_ONE:
        raise ValueError(f"image must be one picture, {name} holds {count}; save the one that the clip starts from")
    if upright.mode == "F":  # Pillow would cut it at 255, and of values up to 1 leave black
        raise ValueError(f"image must be of whole numbers, such as 8 or 16 bits, {name} is of float32")
    if upright.mode in _HIGH_16 or upright.mode == "I":
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    clear = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def image_pixels(image: str | Path | Image | NDArray[np.uint8], height: int, width: int) -> torch.Tensor:
    """The middle of a picture at the target's aspect, scaled by Lanczos: what the published code encodes.

    Args:
        image: As :func:`open_image` takes it.
        height: Rows of the result in pixels; rounded down to a multiple of 32.
        width: Columns, likewise.

    Returns:
        [1, 3, 1, height, width] float32 in -1..1.

    Raises:
        ValueError: ``height`` or ``width`` is below 32, or the picture is too narrow to be cut to their aspect; else
            as :func:`open_image`.
    """
    rows, columns = VAE_STRIDE[1] * PATCH[1], VAE_STRIDE[2] * PATCH[2]
    height = require_whole("height", height, rows) // rows * rows
    width = require_whole("width", width, columns) // columns * columns
    whole = open_image(image)
    box = _middle(*whole.size, height, width)
    if box[2] - box[0] < 1 or box[3] - box[1] < 1:
        raise ValueError(f"image must not be so narrow: {whole.width} x {whole.height} holds no {width} x {height}")
    from PIL.Image import Resampling

    scaled = whole.crop(box).resize((width, height), Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(scaled).astype(np.float32) / 255)
    return (2 * values - 1).permute(2, 0, 1)[None, :, None].contiguous()


def _from_array(pixels: NDArray[Any]) -> Image:
    from PIL import Image

    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in CHANNELS)
    if pixels.dtype != np.uint8 or not fits or 0 in pixels.shape:
        raise ValueError(
            f"image must be [H, W] or [H, W, 1, 3 or 4] of uint8, got {list(pixels.shape)} of {pixels.dtype}"
        )
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _middle(width: int, height: int, target_height: int, target_width: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest part with the target's aspect, as the published code cuts it."""
    if (width, height) == (target_width, target_height):
        return 0, 0, width, height
    new_width, new_height = width, height
    if height / width > target_height / target_width:
        new_height = int(width * target_height / target_width)
    else:
        new_width = int(height * target_width / target_height)
    return (width - new_width) / 2, (height - new_height) / 2, (width + new_width) / 2, (height + new_height) / 2
