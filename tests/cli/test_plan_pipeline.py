"""``plan --pipeline``: memory and floors of the whole path, as tables and as JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest

from happyhorse_fast.cli import run

Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, *arguments: str) -> str:
    assert run(["plan", "--pipeline", *arguments]) == 0
    return capsys.readouterr().out


def test_the_whole_path_in_json(capsys: Capture) -> None:
    data = json.loads(printed(capsys, "--precision", "fp8", "--json"))
    stages = {stage["name"]: stage for stage in data["stages"]}
    assert list(stages) == ["text", "image", "denoise", "super-resolve", "decode audio", "decode video"]
    assert (data["fps"], data["seconds"], data["resolution"]) == (25, 5, "1080p")
    assert data["floor_s"] == pytest.approx(sum(stage["floor_s"] for stage in stages.values())) and data["floor_s"] < 30
    assert max(stage["peak_bytes"] for stage in stages.values()) == data["sequential_gib"] * 2**30
    cards = {card["gb"]: card for card in data["cards"]}
    assert {gb: card["placement"] for gb, card in cards.items()} == {
        24: "mixed", 32: "mixed", 48: "mixed", 80: "resident"
    }  # fmt: skip
    assert cards[24]["kept"] == ["image_encoder", "audio_decoder", "video_decoder"]
    assert all(card["fits"] and card["peak_gib"] <= card["budget_gib"] for card in cards.values())
    assert cards[80]["peak_gib"] == data["resident_gib"]


def test_the_whole_path_in_tables(capsys: Capture) -> None:
    text = printed(capsys, "--precision", "int8", "--seconds", "15")
    assert "the solver's history on the host" in text and "every part stays" in text
    assert "5 of 6 parts stay" in text and "on 48 GB stay: image_encoder, distill, 1080p_sr, audio_" in text
    text = printed(capsys, "--precision", "bf16", "--stages", "1", "--resolution", "256p", "--first", "base")
    assert "super-resolve" not in text and "too large" in text and "256p 16:9, 5 s at 25 fps, bf16" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fps", "24"], "fps must be 25 with --pipeline, which is what the public checkpoints mean; got 24"),
        (["--preset", "tiny"], "--preset must be left out with --pipeline"),
        (["--steps", "8"], "--steps must be left out with --pipeline"),
        (["--video-share", "0.5"], "--video-share must be left out with --pipeline"),
        (["--gpus", "4"], "--gpus must be left out with --pipeline"),
        (["--shard-weights"], "--shard-weights must be left out with --pipeline"),
        (["--no-memory"], "--memory must be left out with --pipeline"),
        (["--stages", "3"], "stages must be from 1 to 2, got 3"),
        (["--first", "second"], "first must be one of distilled, base; got 'second'"),
        (["--decoder", "none"], "decoder must be one of turbo, wan; got 'none'"),
        (["--resolution", "256p"], "resolution of two stages must be one of 540p, 1080p, got '256p'"),
        (["--precision", "fp32"], "precision must be one of bf16, int8, fp8; got 'fp32'"),
        (["--precision", "fp8", "--gpu", "a100"], "a100 has no fp8 tensor cores"),
    ],
)
def test_what_it_refuses(arguments: list[str], message: str, capsys: Capture) -> None:
    assert run(["plan", "--pipeline", *arguments]) == 2
    assert message in capsys.readouterr().err
