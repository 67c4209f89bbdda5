"""The turbo decoder against recorded frames of the public one (commit 209209b, tiny random weights, float32)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from happyhorse_fast.fast.memory import StorageMeter, fake_copy
from happyhorse_fast.pipeline import TurboDecoder, frame_stream, tiling, to_uint8
from happyhorse_fast.pipeline.turbo import LATENT_MEAN, LATENT_STD

RECORDED = load_file(Path(__file__).parent / "turbo_tiny_fp32.safetensors")
WEIGHTS = {key: tensor for key, tensor in RECORDED.items() if key.startswith("decoder.")}
CASES = [key.removeprefix("in.") for key in RECORDED if key.startswith("in.")]
PUBLISHED = TurboDecoder([512, 512, 256, 128, 64], [3, 3, 2, 2, 2]).to(torch.bfloat16).requires_grad_(False)
KEY = "decoder.up_blocks.2.conv_in.conv_shortcut.conv.weight"


@pytest.fixture(scope="module")
def decoder():
    return TurboDecoder.from_tensors(WEIGHTS)


def error(decoder, case):
    """Largest difference from the recorded frames, in units of what float32, or a float16 recording, may differ by."""
    frames, recorded = decoder.decode(RECORDED[f"in.{case}"]), RECORDED[f"out.{case}"]
    assert frames.dtype == torch.float32
    assert frames.shape == recorded.shape
    bound = 1e-5 * recorded.float().abs().max()
    if recorded.dtype == torch.float16:
        bound = bound + torch.finfo(torch.float16).eps / 2 * recorded.float().abs()
    return ((frames - recorded.float()).abs() / bound).max().item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [frame_stream.CHUNK_BYTES, 1, 100_000])
def test_frames_are_the_recorded_ones_whatever_the_chunks(decoder, case, chunk, monkeypatch):
    monkeypatch.setattr(frame_stream, "CHUNK_BYTES", chunk)
    assert error(decoder, case) < 1


def test_the_latents_mean_and_deviation_are_the_recorded_ones():
    assert torch.equal(torch.tensor(LATENT_MEAN), RECORDED["latents.mean"])
    assert torch.equal(torch.tensor(LATENT_STD), RECORDED["latents.std"])


def plant(monkeypatch, **changes):
    whole = tiling.time_windows

    def changed(latents):
        return [
            tiling.TimeWindow(**{**vars(window), **changes}) if window.start else window for window in whole(latents)
        ]

    monkeypatch.setattr(tiling, "time_windows", changed)


def test_a_planted_bug_in_the_windows_is_found(decoder, monkeypatch):
    with monkeypatch.context() as planted:
        plant(planted, skip=3)
        assert error(decoder, "8x2x2") > 100
    with monkeypatch.context() as planted:
        plant(planted, start=7, skip=0)
        assert error(decoder, "8x2x2") > 100
    with monkeypatch.context() as planted:
        planted.setattr(tiling.TimeWindow, "first", False)
        assert error(decoder, "3x2x3") > 100
    with monkeypatch.context() as planted:
        planted.setattr(frame_stream, "as_is", lambda frames, out: out.copy_(frames.flip(0)))
        planted.setattr(frame_stream, "SHORTCUT_EPS", 1.0)
        assert error(decoder, "1x2x3") > 100


@pytest.mark.parametrize("latents", range(1, 17))
def test_windows_give_four_frames_a_latent_but_for_the_first(latents):
    windows = tiling.time_windows(latents)
    assert sum(window.frames for window in windows) == 4 * latents - 3
    assert [window.first for window in windows] == [True] + [False] * (len(windows) - 1)
    padded = len(windows) * 7
    assert latents <= padded < latents + 7
    assert all(window.stop == min(7 * (index + 1) + 1, padded) for index, window in enumerate(windows))
    assert all(window.start == max(7 * index - 1, 0) for index, window in enumerate(windows))


def test_windows_come_one_by_one_and_are_joined(decoder):
    latents = RECORDED["in.15x2x2"]
    windows = list(decoder.windows(latents))
    assert [frames.shape[2] for frames in windows] == [25, 28, 4]
    assert torch.equal(torch.cat(windows, dim=2), decoder.decode(latents))


@pytest.fixture
def narrow():
    """In float64, random; channels change where the published ones do: there, a block has one resnet more."""
    like = TurboDecoder([8, 8, 6, 4, 2], [3, 3, 2, 2, 2]).state_dict()
    drawn = {key: torch.randn(t.shape, dtype=torch.float64) / t[0].numel() ** 0.5 for key, t in like.items()}
    return TurboDecoder.from_tensors(drawn)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("height", "width", "tiles"), [(1, 33, 2), (33, 1, 4), (5, 3, 4)])
def test_tiles_are_exact_by_their_halo(narrow, height, width, tiles, monkeypatch):
    decoder, latents = narrow, torch.randn(1, 48, 1, height, width)
    whole = decoder.decode(latents)

    def difference():
        return (decoder.decode(latents, tiles) - whole).abs().max() / whole.abs().max()

    assert difference() < 1e-14
    monkeypatch.setattr(tiling, "HALO", 0)
    assert difference() > 1e-2


def test_pixels_depend_on_the_latents_of_the_halo_and_no_others(narrow):
    """NaN passes through every product, however small its weight: it shows how far a latent reaches."""
    for distance, reached in [(tiling.HALO, True), (tiling.HALO + 1, False)]:
        for axis in (3, 4):
            latents = torch.zeros(1, 48, 1, *((20, 1) if axis == 3 else (1, 20)))
            latents.select(axis, 2 + distance).fill_(float("nan"))
            frames = narrow.decode(latents)
            assert frames.narrow(axis, 0, 16 * 3).isnan().any() == reached


@pytest.mark.slow
def test_tiles_in_float32_differ_by_rounding(decoder):
    latents = torch.randn(1, 48, 1, 2, 35)
    whole = decoder.decode(latents)
    assert (decoder.decode(latents, 2) - whole).abs().max() / whole.abs().max() < 3e-6


@pytest.mark.parametrize(("tiles", "outer"), [(1, (68, 120)), (2, (68, 75)), (4, (49, 75))])
def test_tiles_of_1080p(tiles, outer):
    grid = tiling.space_tiles(68, 120, tiles)
    assert len(grid) == tiles
    assert {tuple(span.outer_stop - span.outer_start for span in tile) for tile in grid} == {outer}
    covered = torch.zeros(16 * 68, 16 * 120)
    for rows, columns in grid:
        covered[rows.pixels, columns.pixels] += 1
        assert rows.inner_pixels.stop - rows.inner_pixels.start == rows.pixels.stop - rows.pixels.start
    assert (covered == 1).all()


@pytest.mark.parametrize("wrap", [lambda w: {f"module.{k}": t for k, t in w.items()}, lambda w: {"ema_state_dict": w}])
def test_checkpoints_as_they_are_published(wrap, decoder):
    loaded = TurboDecoder.from_tensors(wrap({**WEIGHTS, "encoder.conv_in.weight": torch.zeros(1)}))
    assert loaded.state_dict().keys() == WEIGHTS.keys()
    assert all(torch.equal(tensor, WEIGHTS[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY: None}, f"{KEY} is missing"),
        ({"decoder.conv_in.conv.weight": None}, "decoder.conv_in.conv.weight is missing"),
        ({"decoder.up_blocks.3.resnets.2.conv3.conv.bias": torch.zeros(8)}, "conv3.conv.bias is none of"),
        (
            {"decoder.up_blocks.3.resnets.99999999.conv1.conv.bias": torch.zeros(8)},
            "99999999.conv1.conv.bias is none of",
        ),
        ({KEY: torch.zeros(8, 16, 1, 1, 2)}, f"{KEY} must be \\[8, 16, 1, 1, 1\\], got \\[8, 16, 1, 1, 2\\]"),
        ({KEY: WEIGHTS[KEY].half()}, f"{KEY} is torch.float16"),
        ({KEY: [0.0]}, f"{KEY} must be a tensor, got list"),
        ({f"module.{KEY}": WEIGHTS[KEY]}, f"{KEY} is there twice"),
    ],
)
def test_a_wrong_checkpoint_is_one_error_that_names_the_key(change, message):
    tensors = {key: tensor for key, tensor in {**WEIGHTS, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        TurboDecoder.from_tensors(tensors)


@pytest.mark.parametrize(
    ("shape", "tiles", "message"),
    [
        ((1, 16, 1, 2, 2), 1, "latents must be of size 48"),
        ((48, 1, 2, 2), 1, "latents must have 5 dimensions"),
        ((1, 48, 1, 2, 2), 0, "tiles must be at least 1"),
        ((1, 48, 1, 2, 2), 3, "tiles must be rows times columns of a grid on 2 x 2 latents, got 3"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(decoder, shape, tiles, message):
    with pytest.raises(ValueError, match=message):
        decoder.windows(torch.zeros(shape), tiles)


def test_bfloat16_weights_give_bfloat16_frames(decoder):
    frames = TurboDecoder.from_tensors({key: tensor.bfloat16() for key, tensor in WEIGHTS.items()})
    out, exact = (d.decode(RECORDED["in.3x2x3"]) for d in (frames, decoder))
    assert out.dtype == torch.bfloat16
    # 2.1e-2 measured: 23 convolutions in a row, each after two roundings of 2^-9. A wrong layer gives about 1.
    assert ((out.float() - exact).norm() / exact.norm()) < 3e-2


def test_bytes_are_truncated():
    frames = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert to_uint8(frames).tolist() == [0, 0, 127, 254, 255, 255]
    assert frames[0] == -2, "the frames were written to"


class Launches(TorchDispatchMode):
    """Counts operations that a GPU would launch a kernel for."""

    NONE = ("prim::device", "aten::new_empty", "aten::empty")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
        self.count += not views and func._schema.name not in self.NONE
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width", "count", "teraflop"), [(16, 28, 2364, 66), (32, 56, 6299, 266), (68, 120, 18770, 1190)]
)
def test_kernels_are_longer_than_their_launches(height, width, count, teraflop):
    launches = Launches()
    with FakeTensorMode():
        decoder, latents = fake_copy(PUBLISHED), torch.empty(1, 48, 32, height, width)
        with launches:
            for _ in decoder.windows(latents):
                pass
    assert launches.count == pytest.approx(count, rel=0.02)
    assert teraflop / (0.4 * 989) / launches.count > 10 * 4e-6


@pytest.mark.slow
@pytest.mark.parametrize(("tiles", "gigabytes"), [(1, 9.2), (2, 7.4), (4, 6.4)])
def test_peak_memory_of_a_window_at_1080p(tiles, gigabytes):
    meter = StorageMeter()
    with FakeTensorMode():
        decoder = fake_copy(PUBLISHED)
        latents = torch.empty(9, 68, 120, 48, dtype=torch.bfloat16)
        meter.register([latents, *decoder.parameters()], "inputs")
        with meter:
            decoder._window(latents, tiling.TimeWindow(6, 15, 4, 28), tiling.space_tiles(68, 120, tiles)[:1])
    assert 0.9 * gigabytes * 1e9 < meter.peak_bytes <= gigabytes * 1e9


def test_work_of_five_seconds_at_1080p(monkeypatch):
    monkeypatch.setattr(frame_stream, "CHUNK_BYTES", 2**40)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        decoder = fake_copy(PUBLISHED)
        frames = sum(w.shape[2] for w in decoder.windows(torch.empty(1, 48, 32, 68, 120)))
    assert frames == 125
    assert counter.get_total_flops() / 1e15 == pytest.approx(1.191, rel=1e-3)
