"""Latents on disk between the stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.pipeline.latents import Latents, read_latents
from happyhorse_fast.pipeline.request import DENOISED, RESOLVED, Request


def latents(**changes: object) -> Latents:
    request = Request(prompt="x", seconds=3, resolution="540p", image=True)
    size = request.first_tokens
    video, audio, text = torch.randn(1, 48, *size[:3]), torch.randn(1, size.audio, 64), torch.randn(1, 4, 8)
    state = torch.Generator().manual_seed(3).get_state()
    made = Latents(request, DENOISED, video, audio, text, torch.randn(1, 48, 1, 32, 56), state, "cpu")
    return dataclasses.replace(made, **changes)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    wrote = latents()
    wrote.save(tmp_path / "x.safetensors")
    found = read_latents(tmp_path / "x.safetensors")
    assert (found.request, found.done, found.noise_device) == (wrote.request, DENOISED, "cpu") and not found.whole
    for name in ("video", "audio", "text", "image", "noise"):
        assert torch.equal(getattr(found, name), getattr(wrote, name)), name
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_is_whole() -> None:
    assert dataclasses.replace(latents(), done=RESOLVED).whole
    assert latents(request=Request(prompt="x", stages=1, seconds=3)).whole


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="resume must be a file of latents that a run left, there is none at"):
        read_latents(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match=r"x.safetensors is not a whole file of latents"):
        read_latents(path)
    save_file({"video": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"must be a file of latents that a run left \(format 1\)"):
        read_latents(path)
    latents().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is not a whole file of latents"):
        read_latents(path)
    latents(video=torch.zeros(1, 48, 3, 2, 2)).save(path)
    with pytest.raises(CheckpointError, match=r"holds latents \[1, 48, 3, 2, 2\], its settings ask for"):
        read_latents(path)
    latents(done="text").save(path)
    with pytest.raises(CheckpointError, match="must be of denoise or super-resolve, got 'text'"):
        read_latents(path)
    assert load_file(path)["audio"].shape == (1, 76, 64)
