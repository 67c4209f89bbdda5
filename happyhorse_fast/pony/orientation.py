"""Read EXIF's orientation from JPEG, PNG, WebP and TIFF files, and turn pictures by it."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

ORIENTATION, SHORT = 0x0112, 3
"""The tag, and its type (EXIF 2.32, 4.6.4)."""
UPRIGHT = 1
_EXIF = b"Exif\0\0"


def exif_orientation(content: bytes) -> int | None:
    """Find the orientation in a file's content, 1 to 8 as EXIF has them: 1 where it names none, None of other kinds."""
    if content.startswith(b"\xff\xd8"):
        found = _in_jpeg(content)
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        found = _in_chunks(content, 8, ">", b"eXIf", 4)
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        found = _in_chunks(content, 12, "<", b"EXIF", 0)
    elif content.startswith((b"II*\0", b"MM\0*")):
        found = content
    else:
        return None
    return _of_tiff(found.removeprefix(_EXIF))


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn and mirror a picture [H, W, channels] stored in an orientation of 1 to 8, upright."""
    if orientation >= 5:  # 5 to 8 are 1, 4, 2 and 3 of the picture with rows and columns swapped
        pixels, orientation = pixels.swapaxes(0, 1), {5: 1, 6: 2, 7: 3, 8: 4}[orientation]
    if orientation in (2, 3):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4):
        pixels = pixels[::-1]
    return pixels


def _in_jpeg(content: bytes) -> bytes:
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, size = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker == 0xDA:  # the picture itself
            break
        if marker == 0xE1 and content[at + 4 :].startswith(_EXIF):
            return content[at + 4 : at + 2 + size]
        at += 2 + size
    return b""


def _in_chunks(content: bytes, at: int, order: str, wanted: bytes, check_bytes: int) -> bytes:
    """The data of a chunk; PNG's chunks are (size, name, data, checksum), WebP's (name, size, data to an even end)."""
    while at + 8 <= len(content):
        fields = content[at : at + 8]
        name, digits = (fields[4:], fields[:4]) if order == ">" else (fields[:4], fields[4:])
        size = struct.unpack(f"{order}I", digits)[0]
        if name == wanted:
            return content[at + 8 : at + 8 + size]
        at += 8 + size + check_bytes + (size % 2 if order == "<" else 0)
    return b""


def _of_tiff(content: bytes) -> int:
    """The orientation in the first directory of TIFF data; 1 where there is none, or none that makes sense."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    try:
        if order is None:
            return UPRIGHT
        at = struct.unpack_from(f"{order}I", content, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", content, at)[0]):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", content, at + 2 + 12 * entry)
            if tag == ORIENTATION:
                return value if (kind, count) == (SHORT, 1) and 1 <= value <= 8 else UPRIGHT
    except struct.error:  # cut off: what a decoder makes of the rest is its own affair
        return UPRIGHT
    return UPRIGHT
