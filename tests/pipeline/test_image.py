"""Pictures into pixels: cut and scaled as the published code does it, of any kind of file, and one sentence if not."""

import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.features import check

from happyhorse_fast.pipeline.image import image_pixels, open_image

GREY16 = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def published(image, height, width):
    """The published crop, then what diffusers' processor does; both write what they cut by name."""
    from diffusers.video_processor import VideoProcessor

    w, h = image.size
    if h / w > height / width:
        new_w, new_h = w, int(w * height / width)
    else:
        new_w, new_h = int(h * width / height), h
    cut = image.crop(((w - new_w) / 2, (h - new_h) / 2, (w + new_w) / 2, (h + new_h) / 2))
    return VideoProcessor(vae_scale_factor=16).preprocess(cut, height=height, width=width)


@pytest.mark.parametrize("size", [(101, 203), (203, 101), (64, 96), (33, 31), (500, 50)])
def test_pixels_are_the_published_ones(size):
    image = Image.fromarray(noise(*size))
    pixels = image_pixels(image, 64, 96)
    assert pixels.shape == (1, 3, 1, 64, 96) and pixels.dtype == torch.float32
    assert pixels[:, :, 0].equal(published(image, 64, 96))


def test_sides_round_down_to_whole_patches():
    image = noise(40, 40)
    assert image_pixels(image, 95, 127).equal(image_pixels(image, 64, 96))
    with pytest.raises(ValueError, match="height must be at least 32, got 31"):
        image_pixels(image, 31, 64)
    with pytest.raises(ValueError, match="image must not be so narrow: 1 x 900"):
        image_pixels(noise(900, 1), 32, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_upright(tmp_path, orientation):
    upright = noise(6, 10)
    back = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}[orientation]
    stored = np.rot90(upright, back)
    stored = stored[:, ::-1] if orientation in (2, 4) else stored
    stored = stored[::-1] if orientation in (5, 7) else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), upright)


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.dstack([noise(4, 4), np.zeros((4, 4), np.uint8)])
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown = np.asarray(open_image(tmp_path / "a.png"))
    assert np.array_equal(shown[:2], pixels[:2, :, :3]) and (shown[2:] == 255).all()
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "p.png", transparency=0)
    shown = np.asarray(open_image(tmp_path / "p.png"))
    assert shown[0, 0].tolist() == [255] * 3 and shown[0, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("pixels", "wanted"),
    [
        (noise(5, 7)[..., 0], noise(5, 7)[..., :1].repeat(3, axis=2)),
        (noise(5, 7)[..., :1], noise(5, 7)[..., :1].repeat(3, axis=2)),
        (noise(5, 7), noise(5, 7)),
    ],
)
def test_arrays_and_grey(pixels, wanted):
    assert np.array_equal(np.asarray(open_image(pixels)), wanted)


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(GREY16).save(tmp_path / "a.png")
    shown = np.asarray(open_image(tmp_path / "a.png"))
    assert np.abs(shown[..., 0] - GREY16 / 257).max() <= 0.5


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"whole numbers.*a\.tiff is of float32"):
        open_image(tmp_path / "a.tiff")


def test_a_fifo_gives_a_picture_once(tmp_path):
    content = io.BytesIO()
    Image.fromarray(noise(4, 4)).save(content, format="png")
    os.mkfifo(tmp_path / "pipe")
    feeder = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content.getvalue()))
    feeder.start()
    assert np.array_equal(np.asarray(open_image(tmp_path / "pipe")), noise(4, 4))
    feeder.join()


def written(path, kind):
    if kind == "text":
        path.write_text("no picture")
    elif kind == "truncated":
        Image.fromarray(noise(64, 64)).save(path, format="png")
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "empty second":
        Image.fromarray(noise(4, 4)).save(path, format="tiff")
        content = bytearray(path.read_bytes() + bytes(64))
        (start,) = struct.unpack_from("<I", content, 4)
        (tags,) = struct.unpack_from("<H", content, start)
        struct.pack_into("<I", content, start + 2 + 12 * tags, len(content) - 64)
        path.write_bytes(content)
    elif kind == "avif":
        Image.fromarray(noise(64, 64)).save(path, format="avif")
        path.write_bytes(path.read_bytes().replace(b"av1C", b"av1X"))
    elif kind == "animated":
        frames = [Image.fromarray(noise(4, 4)[i:]).resize((4, 4)) for i in range(3)]
        frames[0].save(path, format="gif", save_all=True, append_images=frames[1:])
    elif kind == "bomb":
        parts = {b"IHDR": struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0), b"IDAT": b"", b"IEND": b""}
        chunks = (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts.items()
        )
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("text", ValueError, "image must be a picture such as a PNG or JPEG, .*a is not$"),
        ("truncated", ValueError, "image must be a picture such as a PNG or JPEG, .*a is damaged: "),
        ("empty second", ValueError, "a is damaged: Missing dimensions"),
        *([("avif", ValueError, "a is damaged: ")] if check("avif") else []),
        ("animated", ValueError, "image must be one picture, .*a holds 3; save the one that the clip starts from"),
        ("bomb", ValueError, "a is damaged: Image size"),
        ("folder", FileNotFoundError, "image must be a file, .*a is none"),
        ("nothing", FileNotFoundError, "image must be a file, .*a is none"),
    ],
)
def test_what_is_no_picture_is_one_sentence(tmp_path, kind, error, message):
    written(tmp_path / "a", kind)
    with pytest.raises(error, match=message) as raised:
        open_image(tmp_path / "a")
    assert "\n" not in str(raised.value)


def test_a_phones_jpeg_with_views_is_its_first_picture(tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.n_frames == 2
    assert np.abs(np.asarray(open_image(tmp_path / "a.jpg")).astype(int) - [255, 0, 0]).max() < 9


@pytest.mark.parametrize(
    ("image", "error"),
    [(3, TypeError), (noise(4, 4).astype(np.float32), ValueError), (noise(4, 4, 2), ValueError)],
)
def test_other_types_are_refused(image, error):
    with pytest.raises(error, match="image must be"):
        open_image(image)
