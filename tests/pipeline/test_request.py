"""Settings of a run: what is allowed, and the sizes and counts that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import happyhorse_fast as hh
from happyhorse_fast.pipeline import pipeline
from happyhorse_fast.pipeline.request import Request, require_rate


@pytest.mark.parametrize(
    ("seconds", "sound", "tokens", "latent_frames", "frames"),
    [(5, False, 126, 32, 125), (3, False, 76, 19, 73), (4, False, 101, 26, 101), (15, False, 376, 94, 373),
     (5, True, 125, 32, 125), (3, True, 75, 19, 73), (4, True, 100, 25, 97)],
)  # fmt: skip
def test_counts_of_a_clip(seconds: int, sound: bool, tokens: int, latent_frames: int, frames: int) -> None:
    request = Request(prompt="x", seconds=seconds, sound=sound)
    assert (request.audio_tokens, request.latent_frames, request.frames) == (tokens, latent_frames, frames)
    assert request.first_tokens == (latent_frames, 16, 28, tokens)
    assert request.last_tokens == (latent_frames, 68, 120, tokens)


def test_one_stage_has_one_size_and_one_model() -> None:
    request = Request(prompt="x", stages=1, resolution="540p", aspect="9:16", first="base")
    assert request.first_tokens == request.last_tokens == (32, 56, 32, 126)
    assert request.models == ["base"]
    assert Request(prompt="x", resolution="540p").models == ["distill", "540p_sr"]


def test_plain_data_and_back() -> None:
    request = Request(prompt="x", negative_prompt="y", first="base", seconds=7, sound=True, seed=3)
    assert Request(**request.to_dict()) == request
    numbers = Request(prompt="x", seconds=np.float32(5), seed=np.int64(3), stages=np.int8(1))  # type: ignore[arg-type]
    assert json.loads(json.dumps(numbers.to_dict())) == numbers.to_dict()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": " "}, ValueError, "prompt must say something, got ' '"),
        ({"prompt": 3}, TypeError, "prompt must be text, got 3 of type int"),
        ({"negative_prompt": "", "first": "base"}, ValueError, "negative_prompt must say something"),
        ({"negative_prompt": "x"}, ValueError, 'negative_prompt must come with first="base"'),
        ({"seconds": 2}, ValueError, "seconds must be a whole number from 3 to 15; got 2"),
        ({"resolution": "720p"}, ValueError, "resolution must be one of 1080p, 540p, 256p; got '720p'"),
        ({"resolution": "256p"}, ValueError, "resolution of two stages must be one of 540p, 1080p.*stages=1 makes"),
        ({"aspect": "4:3"}, ValueError, "aspect must be one of"),
        ({"stages": 3}, ValueError, "stages must be from 1 to 2, got 3"),
        ({"first": "distill"}, ValueError, "first must be one of distilled, base; got 'distill'"),
        ({"seed": -1}, ValueError, "seed must be from 0 to"),
        ({"noise": "cuda"}, ValueError, "noise must be one of device, cpu; got 'cuda'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Request(**{"prompt": "x"} | change)


def test_other_rates_are_refused_with_the_reason() -> None:
    require_rate(25)
    with pytest.raises(ValueError, match=r"fps must be 25: .*51,200 audio samples.*got 24"):
        require_rate(24)


@pytest.mark.parametrize(
    ("arch", "precision"),
    [(None, None), (75, "bf16"), (80, "int8"), (86, "int8"), (89, "int8"), (90, "int8"), (100, "fp8"), (120, "fp8")],
)
def test_auto_takes_the_8_bits_that_were_decided_for_a_device(
    arch: int | None, precision: str | None, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # docs/decisions/0015: int8 keeps clips 10 dB closer; from sm_100 on Triton has only sm_80's instructions for it.
    monkeypatch.setattr(pipeline, "compute_capability", lambda device: arch)
    fast = hh.Pipeline.from_pretrained(tiny, device="cpu").parts.fast
    assert (fast and fast.precision) == precision


def test_auto_takes_the_precision_of_packed_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(tiny, folder)
    parts = hh.Pipeline.from_pretrained(folder, device="cpu", precision="fp8").parts
    with parts.using("1080p_sr") as model:
        hh.save_packed(model, folder / "packed")
    shutil.rmtree(folder / "1080p_sr")
    (folder / "packed").rename(folder / "1080p_sr")
    monkeypatch.setattr(pipeline, "compute_capability", lambda device: 90)
    made = hh.Pipeline.from_pretrained(folder, device="cpu").parts
    assert made.fast is not None and made.fast.precision == "fp8"
    assert made.config("1080p_sr") == model.config and made.config("distill")
