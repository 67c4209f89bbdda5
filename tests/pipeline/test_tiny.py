"""The tiny checkpoint: every part loads strictly, by the loader of its library."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, AutoencoderOobleck

import happyhorse_fast as hh
from happyhorse_fast import optional
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.header import read_headers
from happyhorse_fast.pipeline import TurboDecoder
from happyhorse_fast.pipeline import tiny as tiny_module

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_checkpoint.py"


def noted(folder, name):
    return hh.ModelConfig(**json.loads((folder / tiny_module.NOTE).read_text())[name]["config"])


def inputs(config):
    noise = torch.Generator().manual_seed(0)
    shapes = (1, 48, 2, 4, 4), (1, 5, 64), (1, 7, config.text_in_channels)
    return [torch.randn(shape, generator=noise) for shape in shapes]


@pytest.mark.parametrize("name", tiny_module.MODELS)
@torch.no_grad()
@pytest.mark.parametrize("precision", [None, "bf16", "int8", "fp8"])
def test_models_load_by_their_note_in_every_precision(tiny, name, precision):
    config = noted(tiny, name)
    fast = None if precision is None else hh.FastConfig(backend="reference", precision=precision)
    model = hh.load(tiny / name, config=config, progress=False, fast=fast)
    video, audio = model(*inputs(config))
    assert video.shape == (1, 48, 2, 4, 4) and audio.shape == (1, 5, 64)
    assert 0.1 < video.std().item() < 10


def test_models_are_stored_as_the_published_ones(tiny):
    assert {entry.dtype for entry in read_headers(tiny / "base").values()} == {"BF16"}
    assert {entry.dtype for entry in read_headers(tiny / "1080p_sr").values()} == {"F32"}
    assert (tiny / "distill" / "model.safetensors.index.json").exists()
    assert (tiny / "base" / "model.safetensors").exists()


def test_a_configuration_of_another_model_is_refused(tiny):
    with pytest.raises(CheckpointError, match="num_layers"):
        hh.load(tiny / "distill", config=noted(tiny, "distill").replace(num_layers=4), progress=False)


def test_codecs_load_by_their_library(tiny):
    for kind, folder in (
        (AutoencoderKLWan, "Wan2.2-TI2V-5B-Diffusers/vae"),
        (AutoencoderOobleck, "stable-audio-open-1.0/vae"),
    ):
        _, report = kind.from_pretrained(tiny / folder, output_loading_info=True)
        assert not any(report.values()), report


def test_the_turbo_decoder_loads_strictly_and_gives_frames(tiny):
    tensors = torch.load(next((tiny / "turbo_vae").glob("*.ckpt")), weights_only=True)
    frames = TurboDecoder.from_tensors(tensors).decode(torch.randn(1, 48, 2, 2, 2))
    assert frames.shape == (1, 3, 5, 32, 32)
    assert 0.01 < float(frames.std()) < 100


def test_the_same_seed_gives_the_same_files_and_a_run_leaves_the_random_state(tiny, tmp_path, monkeypatch, capsys):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "again")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert torch.equal(torch.get_rng_state(), before)
    files = sorted(path.relative_to(tiny) for path in tiny.rglob("*") if path.is_file())
    different = [file for file in files if (tiny / file).read_bytes() != (tmp_path / "again" / file).read_bytes()]
    assert different == []
    printed = capsys.readouterr()
    assert "is whole: 16.2 MB" in printed.out and "distill: 1.77 MB" in printed.out
    assert printed.err == ""


def test_what_is_missing_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(optional, "obstacle", lambda package: f"{package} is not installed")
    with pytest.raises(ImportError, match="a tiny checkpoint needs transformers: transformers is not installed"):
        tiny_module.write_tiny_checkpoint(tmp_path / "new")
    assert not (tmp_path / "new").exists()
