"""Stable Audio's codec against diffusers' own, bit for bit, in both published layouts; damaged files."""

import json
import shutil
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_audio import Codec

from happyhorse_fast.pipeline.audio import AudioCodec
from happyhorse_fast.pipeline.tiny import AUDIO_FOLDER

WEIGHTS = "diffusion_pytorch_model.safetensors"
MULTIPLES, STRIDES = [1, 1, 2, 2, 2], [2, 4, 4, 8, 8]


@pytest.fixture(scope="module")
def folder(tiny):
    return (tiny / AUDIO_FOLDER).parent


@pytest.fixture(scope="module")
def codec(folder):
    return AudioCodec.load(folder)


@pytest.fixture(scope="module")
def library(folder):
    from diffusers import AutoencoderOobleck

    with quiet():
        return AutoencoderOobleck.from_pretrained(folder / "vae")


@contextmanager
def quiet():
    """Where torch tells a library that weight_norm is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def generator():
    return torch.Generator().manual_seed(7)


@pytest.mark.filterwarnings("error")
def test_loading_warns_of_nothing(folder):
    AudioCodec.load(folder)


@torch.no_grad()
def test_sound_is_the_librarys(codec, library):
    latents = torch.randn(1, 5, 64)
    sound = codec.decode(latents)
    assert sound.shape == (2, 5 * 2048)
    assert sound.equal(library.decode(latents.transpose(1, 2)).sample[0])


@torch.no_grad()
def test_latents_are_a_sample_of_the_librarys_posterior(codec, library):
    sound = torch.rand(3 * 2048 + 2047) * 2 - 1
    latent = codec.encode(sound, generator=generator())
    posterior = library.encode(sound.expand(1, 2, -1)).latent_dist
    assert latent.shape == (1, 3, 64)
    assert latent.equal(posterior.sample(generator()).transpose(1, 2))
    assert not latent.equal(posterior.mode().transpose(1, 2))


def test_a_sound_is_cut_or_filled_up_to_the_seconds(codec):
    sound = torch.rand(6000) * 2 - 1
    for seconds in (0.08, 0.2):
        exact = torch.cat([sound, torch.zeros(51_200)])[: int(seconds * 51_200)]
        latent = codec.encode(sound, seconds, generator())
        assert latent.shape == (1, round(25 * seconds), 64)
        assert latent.equal(codec.encode(exact, generator=generator()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(A folder as the root of the published repository, the codec whose weights it has)."""
    folder = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    with quiet():
        codec = Codec((128, 8), MULTIPLES, STRIDES)
    inside = {f"pretransform.model.{key}": tensor.contiguous() for key, tensor in codec.state_dict().items()}
    save_file({**inside, "model.model.transformer.layers.0.ff.weight": torch.zeros(3)}, folder / "model.safetensors")
    half = {"c_mults": MULTIPLES, "strides": STRIDES, "use_snake": True}
    config = {
        "encoder": {"type": "oobleck", "config": {**half, "in_channels": 2, "channels": 128, "latent_dim": 128}},
        "decoder": {
            "type": "oobleck",
            "config": {**half, "out_channels": 2, "channels": 8, "latent_dim": 64, "final_tanh": False},
        },
    }
    settings = {"sample_rate": 44_100, "model": {"pretransform": {"type": "autoencoder", "config": config}}}
    (folder / "model_config.json").write_text(json.dumps(settings))
    return folder, codec


@torch.no_grad()
def test_the_whole_models_file_holds_the_same_codec(whole):
    folder, reference = whole
    codec = AudioCodec.load(folder)
    latents = torch.randn(1, 4, 64)
    torch.testing.assert_close(codec.decode(latents), reference.decoder(latents.transpose(1, 2))[0])
    sound = torch.rand(4 * 2048) * 2 - 1
    wanted = reference.sample(sound.expand(1, 2, -1), generator()).transpose(1, 2)
    torch.testing.assert_close(codec.encode(sound, generator=generator()), wanted)


def test_a_half_takes_no_memory_of_the_other(folder, whole):
    for source in (folder, folder / "vae", whole[0]):
        assert {name for name, _ in AudioCodec.load(source, encoder=False).vae.named_children()} == {"decoder"}
    half = AudioCodec.load(folder, decoder=False)
    assert not [name for name in half.vae.state_dict() if not name.startswith("encoder.")]
    with pytest.raises(ValueError, match=r"decoder must be True in AudioCodec\.load"):
        half.decode(torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match="encoder or decoder must be True"):
        AudioCodec.load(folder, encoder=False, decoder=False)


def changed(file, tensors):
    there = {**load_file(file), **tensors}
    save_file({key: tensor for key, tensor in there.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("layout", "tensors", "message"),
    [
        ("vae", {"decoder.conv1.bias": None}, "decoder.conv1.bias is missing"),
        ("vae", {"decoder.conv1.bias": torch.zeros(3)}, r"decoder.conv1.bias must be \[8\], got \[3\]"),
        ("root", {"pretransform.model.decoder.layers.0.bias": None}, "decoder.conv1.bias is missing"),
        ("root", {"pretransform.model.decoder.layers.3.layers.9.bias": torch.zeros(3)}, "layers.9.bias is none of"),
        ("root", {"pretransform.model.bottleneck.x": torch.zeros(3)}, "bottleneck.x is none of the model's"),
        (
            "root",
            {"pretransform.model.encoder.layers.2.layers.3.alpha": torch.zeros(3)},
            r"encoder.block.1.snake1.alpha must be \[1, 128, 1\], got \[1, 3, 1\]",
        ),
    ],
)
def test_foreign_weights_are_refused_by_key(folder, whole, tmp_path, layout, tensors, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder if layout == "vae" else whole[0], copy)
    changed(copy / "vae" / WEIGHTS if layout == "vae" else copy / "model.safetensors", tensors)
    for refuses in (AudioCodec.check, AudioCodec.load):
        with pytest.raises(ValueError, match=message):
            refuses(copy)


def edit(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit(f / "vae" / "config.json", _class_name="AutoencoderKL"), "got 'AutoencoderKL'"),
        (lambda f: edit(f / "vae" / "config.json", audio_channels=1), "audio_channels must be 2, got 1"),
        (lambda f: edit(f / "vae" / "config.json", downsampling_ratios=[2, 4, 8]), "must multiply to 2048"),
        (lambda f: (f / "vae" / WEIGHTS).unlink(), "no safetensors file"),
        (lambda f: (f / "vae" / WEIGHTS).write_bytes((f / "vae" / WEIGHTS).read_bytes()[:-8]), "truncated"),
        (lambda f: shutil.rmtree(f / "vae"), r"holds neither config\.json and .* nor model\.safetensors"),
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: edit(f / "vae" / "config.json", channel_multiples={}), "vae: diffusers makes no codec of it: "),
        (
            lambda f: edit(f / "vae" / "config.json", downsampling_ratios=[2, "x"]),
            "downsampling_ratios must multiply to 2048",
        ),
    ],
)
def test_what_is_wrong_is_said_before_loading(folder, tmp_path, spoil, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    AudioCodec.check(copy)
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        AudioCodec.check(copy)


def test_a_whole_model_of_another_kind_is_refused(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    AudioCodec.check(copy)
    save_file({"model.x": torch.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"no key starts with pretransform\.model\."):
        AudioCodec.check(copy)
    edit(copy / "model_config.json", model={})
    with pytest.raises(ValueError, match=r"model_config\.json: not of .* lacks 'pretransform'"):
        AudioCodec.check(copy)
    (copy / "model_config.json").unlink()
    with pytest.raises(ValueError, match=r"model_config\.json: no such file"):
        AudioCodec.check(copy)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda codec: codec.decode(torch.zeros(1, 64, 3)), "latents must be of size 64"),
        (lambda codec: codec.encode(torch.zeros(2, 9000)), "sound must have 1 dimensions"),
        (lambda codec: codec.encode(torch.zeros(2047)), "sound must have at least 2048 samples, got 2047"),
    ],
)
def test_wrong_arguments_are_refused(codec, call, message):
    with pytest.raises(ValueError, match=message):
        call(codec)
