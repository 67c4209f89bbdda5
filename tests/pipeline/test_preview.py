"""Previews: the map of a linear decoder is found exactly."""

import numpy as np
import pytest
import torch
from PIL import Image

from happyhorse_fast.pipeline import to_uint8
from happyhorse_fast.pipeline.preview import Preview, fit_preview

WEIGHT, BIAS = torch.randn(48, 3, generator=torch.Generator().manual_seed(1)) / 30, torch.tensor([0.1, -0.2, 0.3])


class Linear:
    """A decoder whose pixels are a map of the mean of the 3 x 3 latents around them."""

    def windows(self, latents, tiles=1):
        mean = torch.nn.functional.avg_pool2d(latents[:, :, 0], 3, 1, 1, count_include_pad=False)[:, :, None]
        colours = torch.einsum("ncthw,cd->ndthw", mean, WEIGHT) + BIAS.view(1, 3, 1, 1, 1)
        yield colours.repeat_interleave(16, dim=3).repeat_interleave(16, dim=4)


def test_a_linear_decoder_is_found():
    found = fit_preview(Linear())
    torch.testing.assert_close(found.weight, WEIGHT, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.bias, BIAS, atol=1e-6, rtol=0)
    assert fit_preview(Linear()).weight.equal(found.weight)


def test_a_decoder_without_colours_is_refused():
    class Broken:
        def windows(self, latents, tiles=1):
            yield latents.new_full((1, 3, 1, 288, 288), float("nan"))

    with pytest.raises(RuntimeError, match="must give finite colours"):
        fit_preview(Broken())


def latents():
    """The upper half of the middle frame in one colour, the lower in another."""
    made = torch.zeros(1, 48, 5, 4, 6)
    made[0, :, 2, :2] = (torch.tensor([0.5, -0.5, 0.0]) @ WEIGHT.pinverse())[:, None, None]
    return made


def test_a_picture_shows_the_middle_frame(tmp_path):
    found = Preview(WEIGHT, torch.zeros(3))
    picture = found.picture(latents())
    assert picture.shape == (4, 6, 3) and picture.dtype == torch.uint8
    assert picture[0, 0].tolist() == to_uint8(torch.tensor([0.5, -0.5, 0.0])).tolist()
    assert picture[3, 5].tolist() == [127] * 3
    assert found.picture(latents()[:, :, :2]).eq(127).all()
    found.save(tmp_path / "a.png", latents())
    shown = np.asarray(Image.open(tmp_path / "a.png"))
    assert shown.shape == (16, 24, 3) and np.abs(shown[1, 1].astype(int) - picture[0, 0].numpy()).max() < 12
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.picture(torch.zeros(1, 16, 1, 2, 2)), "latents must be of size 48"),
        (lambda found: found.picture(torch.zeros(1, 48, 3, 2, 2), scale=0), "scale must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Preview(WEIGHT, BIAS))
