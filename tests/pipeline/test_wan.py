"""The Wan codec against diffusers' own, bit for bit, and what is wrong with a folder said before it is loaded."""

import json
import shutil
from collections import deque
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from happyhorse_fast.fast.memory import StorageMeter, fake_copy
from happyhorse_fast.pipeline.tiny import VIDEO_FOLDER
from happyhorse_fast.pipeline.wan import WanCodec

WEIGHTS = "diffusion_pytorch_model.safetensors"
KEY = "decoder.conv_in.weight"


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny / VIDEO_FOLDER


@pytest.fixture(scope="module")
def codec(folder):
    return WanCodec.load(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def library(folder):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder)


@torch.no_grad()
def test_frames_are_the_librarys(codec, library):
    latents = torch.randn(1, 48, 3, 2, 4)
    unnormalized = latents / (1 / codec_std(library)) + codec_mean(library)
    windows = list(codec.windows(latents))
    assert [w.shape[2] for w in windows] == [1, 4, 4]
    assert torch.cat(windows, dim=2).equal(library.decode(unnormalized).sample)


def codec_mean(library):
    return torch.tensor(library.config.latents_mean).view(1, -1, 1, 1, 1)


def codec_std(library):
    return torch.tensor(library.config.latents_std).view(1, -1, 1, 1, 1)


def test_two_clips_in_turns_would_mix_so_a_new_one_starts_afresh(codec):
    latents = torch.randn(1, 48, 2, 2, 2)
    whole = torch.cat(list(codec.windows(latents)), dim=2)
    unfinished = codec.windows(torch.randn(1, 48, 3, 2, 2))
    next(unfinished)
    unfinished.close()
    assert torch.cat(list(codec.windows(latents)), dim=2).equal(whole)


@torch.no_grad()
def test_latents_are_the_librarys(codec, library):
    pixels = torch.rand(1, 3, 1, 64, 32) * 2 - 1
    mean = library.encode(pixels).latent_dist.mode()
    assert codec.encode(pixels).equal((mean - codec_mean(library)) * (1 / codec_std(library)))


@torch.no_grad()
def test_half_a_codec_in_bfloat16_is_the_librarys(folder, library):
    """Mean and 1 / std are rounded as the published code rounds them: 1 / std of a std in bf16."""
    library = type(library).from_pretrained(folder, torch_dtype=torch.bfloat16)
    half = WanCodec.load(folder, decoder=False)
    pixels = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    mean = library.encode(pixels.bfloat16()).latent_dist.mode()
    wanted = (mean - codec_mean(library).bfloat16()) * (1 / codec_std(library).bfloat16())
    assert wanted.dtype == torch.bfloat16
    latent = half.encode(pixels)
    assert latent.dtype == torch.float32 and latent.equal(wanted.float())
    assert not latent.equal(((mean - codec_mean(library)) / codec_std(library)).float())
    assert {name.partition(".")[0] for name in half.vae.state_dict()} == {"encoder", "quant_conv"}
    with pytest.raises(ValueError, match=r"decoder must be True in WanCodec\.load for this"):
        half.windows(torch.zeros(1, 48, 1, 2, 2))
    with pytest.raises(ValueError, match="encoder or decoder must be True, got False for both"):
        WanCodec.load(folder, encoder=False, decoder=False)


def damaged(folder, tmp_path, *, config=None, tensors=None):
    copy = tmp_path / "vae"
    shutil.copytree(folder, copy)
    if config is not None:
        settings = {**json.loads((copy / "config.json").read_text()), **config}
        (copy / "config.json").write_text(json.dumps(settings))
    if tensors is not None:
        changed = {**load_file(copy / WEIGHTS), **tensors}
        save_file({key: tensor for key, tensor in changed.items() if tensor is not None}, copy / WEIGHTS)
    return copy


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({KEY: None}, f"{KEY} is missing"),
        ({KEY: torch.zeros(2, 3)}, rf"{KEY} must be \[32, 48, 3, 3, 3\], got \[2, 3\]"),
        ({"decoder.more": torch.zeros(2)}, "decoder.more is none of the model's"),
        ({"decoder.conv_in.bias": torch.zeros(32, dtype=torch.int8)}, "must be of floating point, got I8"),
        ({"decoder.conv_in.bias": torch.full((32,), torch.nan)}, "decoder.conv_in.bias holds 32 NaN"),
    ],
)
def test_foreign_weights_are_refused_by_key(folder, tmp_path, tensors, message):
    copy = damaged(folder, tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        WanCodec.load(copy)
    if "NaN" not in message:  # which only reading shows
        with pytest.raises(ValueError, match=message):
            WanCodec.check(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_dim": "4"}, r"config\.json: diffusers makes no codec of it: TypeError"),
        ({"_class_name": "AutoencoderKL"}, "_class_name must be 'AutoencoderKLWan', got 'AutoencoderKL'"),
        ({"z_dim": 16, "patch_size": None}, "z_dim must be 48, got 16; patch_size must be 2, got None"),
        ({"latents_mean": [0.0] * 16}, "latents_mean must be 48 numbers"),
    ],
)
def test_a_foreign_config_is_refused(folder, tmp_path, config, message):
    copy = damaged(folder, tmp_path, config=config)
    for refuses in (WanCodec.load, WanCodec.check):
        with pytest.raises(ValueError, match=message):
            refuses(copy)


def test_missing_and_truncated_files_are_named_without_loading(folder, tmp_path):
    WanCodec.check(folder)
    copy = damaged(folder, tmp_path, config={"clip_output": False})
    WanCodec.check(copy)
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[:-4])
    with pytest.raises(ValueError, match="truncated"):
        WanCodec.check(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="no safetensors file"):
        WanCodec.check(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        WanCodec.check(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        WanCodec.check(copy)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda codec: codec.encode(torch.zeros(1, 3, 5, 32, 32)), "pixels must be of size 1 in dimension 2"),
        (lambda codec: codec.windows(torch.zeros(1, 16, 1, 2, 2)), "latents must be of size 48"),
        (lambda codec: codec.windows(torch.zeros(1, 48, 1, 2, 2), 2), "tiles must be from 1 to 1, got 2"),
    ],
)
def test_wrong_arguments_are_refused(codec, call, message):
    with pytest.raises(ValueError, match=message):
        call(codec)


@pytest.fixture(scope="module")
def published(folder):
    """The published sizes, without their numbers."""
    from diffusers import AutoencoderKLWan

    settings = {**json.loads((folder / "config.json").read_text()), "base_dim": 160, "decoder_base_dim": 256}
    with torch.device("meta"), default_dtype(torch.bfloat16):
        return AutoencoderKLWan.from_config(settings).requires_grad_(False)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def test_peak_memory_at_1080p_does_not_grow_with_the_clip(published):
    def peak(half, run):
        with FakeTensorMode():
            codec = WanCodec(fake_copy(published))
            meter = StorageMeter()
            meter.register(list(getattr(codec.vae, half).parameters()), "inputs")
            with meter:
                run(codec)
        return meter.peak_bytes / 1e9

    def decode(latents):
        return peak("decoder", lambda codec: deque(codec.windows(torch.empty(1, 48, latents, 68, 120)), maxlen=0))

    assert peak("encoder", lambda codec: codec.encode(torch.empty(1, 3, 1, 1088, 1920))) == pytest.approx(2.4, rel=0.03)
    assert decode(3) == pytest.approx(23.6, rel=0.01)
    assert decode(5) == pytest.approx(decode(3), rel=2e-3)
