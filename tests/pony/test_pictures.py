"""Pictures as viewers show them: turned, white where they are transparent, of any kind of pixel; films turned too."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from happyhorse_fast.pony.media import read_image

Pixels = NDArray[np.uint8]
# Corners of the upright picture: red, green; blue, white.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
# What is stored of an upright picture, by orientation (EXIF 2.32, 4.6.4 A).
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[:, ::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[:, ::-1],
}


def upright() -> Pixels:
    """[64, 96, 3]: sides are cut off, so an unturned one shows by its shape as well."""
    return CORNERS.repeat(32, axis=0).repeat(48, axis=1)


def corners(image: torch.Tensor) -> torch.Tensor:
    return image[8::112, 8::112].mul(255).round()


def write(path: Path, pixels: NDArray[np.generic], codec: str, of: str, to: str | None = None) -> None:
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream(codec, rate=1)
        stream.height, stream.width, stream.pix_fmt = pixels.shape[0], pixels.shape[1], to or of
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=of).reformat(format=to or of)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def exif(orientation: int, order: str) -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    other = struct.pack(f"{order}HHII", 0x0100, 4, 1, 7)
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return head + struct.pack(f"{order}H", 2) + other + entry + struct.pack(f"{order}I", 0)


def with_exif(path: Path, tiff: bytes) -> None:
    content = path.read_bytes()
    if path.suffix == ".jpg":
        data = b"Exif\0\0" + tiff
        path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + content[2:])
    else:
        chunk = b"eXIf" + tiff
        made = struct.pack(">I", len(tiff)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:33] + made + content[33:])  # behind IHDR


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("name", "codec", "to"), [("a.png", "png", "rgb24"), ("a.jpg", "mjpeg", "yuvj444p")])
def test_a_turned_picture_is_upright(
    name: str, codec: str, to: str, orientation: int, order: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, STORED[orientation](upright()), codec, "rgb24", to)
    with_exif(path, exif(orientation, order))
    torch.testing.assert_close(corners(read_image(path)), torch.from_numpy(CORNERS).float(), rtol=0, atol=8)


@pytest.mark.parametrize(
    "tiff", [b"", b"II*\0", exif(0, "<"), exif(9, "<"), exif(6, "<")[:20], b"MM\0*\xff\xff\xff\xff", b"nonsense" * 4]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_orientation_is_none(tiff: bytes, tmp_path: Path) -> None:
    for name, codec, to in (("a.png", "png", "rgb24"), ("a.jpg", "mjpeg", "yuvj444p")):
        write(tmp_path / name, upright(), codec, "rgb24", to)
        with_exif(tmp_path / name, tiff)
        torch.testing.assert_close(
            corners(read_image(tmp_path / name)), torch.from_numpy(CORNERS).float(), rtol=0, atol=8
        )


def write_film(path: Path, stored: Pixels, title: str = "") -> None:
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode())


def test_a_film_whose_tags_are_not_in_utf_8_is_read(tmp_path: Path) -> None:
    path, title = tmp_path / "a.mp4", "Caf\u00e9\u00e9"
    write_film(path, upright(), title)
    content = path.read_bytes()
    assert content.count(title.encode()) == 1
    path.write_bytes(content.replace(title.encode(), title.encode("latin-1").ljust(len(title.encode()))))
    torch.testing.assert_close(corners(read_image(path)), torch.from_numpy(CORNERS).float(), rtol=0, atol=12)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_turned_film_is_upright(turn: int, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_film(path, np.ascontiguousarray(np.rot90(upright(), turn // 90)))  # to be shown turned clockwise
    content = bytearray(path.read_bytes())
    sine, cosine = {0: (0, 1), 90: (1, 0), 180: (0, -1), 270: (-1, 0)}[turn]
    at = content.index(b"tkhd") + 4 + 40  # the matrix (ISO 14496-12, 8.3.2)
    one = 1 << 16
    struct.pack_into(">9i", content, at, cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    torch.testing.assert_close(corners(read_image(path)), torch.from_numpy(CORNERS).float(), rtol=0, atol=12)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    """Hidden colours do not show, half-transparent ones are mixed."""
    pixels = np.dstack([upright(), np.full((64, 96), 255, np.uint8)])
    pixels[:32, :48, 3], pixels[:32, 48:, 3], pixels[32:, :48, 3] = 0, 128, 64
    write(tmp_path / "a.png", pixels, "png", "rgba")
    wanted = torch.tensor([[[255, 255, 255], [127, 255, 127]], [[191, 191, 255], [255, 255, 255]]]).float()
    torch.testing.assert_close(corners(read_image(tmp_path / "a.png")), wanted, rtol=0, atol=1)


def test_a_transparent_grey_and_palette_are_white_too(tmp_path: Path) -> None:
    grey = np.full((64, 64), 60, np.uint8)
    write(tmp_path / "ya.png", np.dstack([grey, grey, grey, 0 * grey]), "png", "rgba", "ya8")
    assert read_image(tmp_path / "ya.png").eq(1).all()
    header = struct.pack(">IIBBBBB", 64, 64, 8, 3, 0, 0, 0)
    parts = {
        b"IHDR": header,
        b"PLTE": bytes([10, 20, 30, 200, 100, 50]),
        b"tRNS": bytes([0]),
        b"IDAT": zlib.compress((b"\0" + b"\0" * 32 + b"\1" * 32) * 64),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    wanted = torch.tensor([[255, 255, 255], [200, 100, 50]]).float().repeat(2, 1, 1)
    assert corners(read_image(tmp_path / "p.png")).equal(wanted)


@pytest.mark.parametrize(("of", "dtype", "most"), [("gray", np.uint8, 255), ("gray16be", np.uint16, 65535)])
def test_grey_is_grey(of: str, dtype: type[np.generic], most: int, tmp_path: Path) -> None:
    values = (np.array([[0.0, 0.25], [0.5, 1.0]]) * most).astype(dtype).repeat(32, axis=0).repeat(32, axis=1)
    write(tmp_path / "a.png", values, "png", of)
    wanted = torch.tensor([[0.0, 63.75], [127.5, 255.0]])[..., None].expand(2, 2, 3)
    torch.testing.assert_close(corners(read_image(tmp_path / "a.png")), wanted, rtol=0, atol=1.5)
