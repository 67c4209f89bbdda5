"""Where the parts are found, and what is said where one is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.pipeline.layout import PARTS, read_layout

TINY = ModelConfig.preset("tiny")


def folder(root: Path, *names: str, note: Any = None) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    if note is not None:
        (root / "pipeline.json").write_text(note if isinstance(note, str) else json.dumps(note))
    return root


def test_published_names_are_found(tmp_path: Path) -> None:
    published = {
        "distill": "distill",
        "1080p_sr": "1080p_sr",
        "turbo_vae": "turbo_vae",
        "text_encoder": "t5gemma-9b-9b-ul2",
        "video_vae": "Wan2.2-TI2V-5B-Diffusers/vae",
        "audio_vae": "stable-audio-open-1.0",
    }
    layout = read_layout(folder(tmp_path, *published.values()), {})
    assert {name: layout.find(name) for name in published} == {k: tmp_path / v for k, v in published.items()}
    assert {name for name in PARTS if layout.there(name)} == set(published)
    assert layout.model("1080p_sr") == {
        "path": tmp_path / "1080p_sr",
        "preset": "davinci-magihuman-sr-1080p",
        "config": None,
    }


def test_a_named_folder_goes_before_the_note_and_the_note_before_the_published_name(tmp_path: Path) -> None:
    names = ("distill", "turbo_vae", "elsewhere/turbo", "third", "t5gemma-9b-9b-ul2")
    note = {"turbo_vae": {"path": "elsewhere/turbo"}, "text_encoder": {"path": "elsewhere/turbo"}}
    root = folder(tmp_path, *names, note=note)
    layout = read_layout(root, {"text_encoder": root / "third", "audio_vae": None})
    assert layout.find("turbo_vae") == root / "elsewhere/turbo"
    assert layout.find("text_encoder") == root / "third"
    assert layout.find("distill") == root / "distill"


def test_a_note_says_what_a_model_is(tmp_path: Path) -> None:
    note = {"distill": {"config": TINY.to_dict()}, "base": {"preset": "tiny", "path": "distill"}}
    layout = read_layout(folder(tmp_path, "distill", note=note), {})
    assert layout.model("distill") == {"path": tmp_path / "distill", "preset": None, "config": TINY}
    assert layout.model("base") == {"path": tmp_path / "distill", "preset": "tiny", "config": None}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text_encoder", ["google/t5gemma-9b-9b-ul2", "Gemma terms of use, access on request"]),
        ("audio_vae", ["stabilityai/stable-audio-open-1.0", "Stability AI Community License, access on request"]),
        ("video_vae", ["Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Apache-2.0"]),
        ("540p_sr", ["GAIR/daVinci-MagiHuman, folder 540p_sr"]),
    ],
)
def test_a_missing_part_says_where_it_is_published_and_on_which_terms(
    tmp_path: Path, name: str, words: list[str]
) -> None:
    layout = read_layout(folder(tmp_path, "distill"), {})
    with pytest.raises(FileNotFoundError) as error:
        layout.find(name)
    for word in (name, *words, "nothing is downloaded", "pipeline.json"):
        assert word in str(error.value)


@pytest.mark.parametrize("names", [(), ("turbo_vae", "1080p_sr")])
def test_a_folder_without_a_first_stage_says_how_to_get_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither distill nor base.*tiny_checkpoint.py"):
        read_layout(folder(tmp_path, *names), {})
    with pytest.raises(FileNotFoundError, match="there is none at"):
        read_layout(tmp_path / "gone", {})


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be a JSON object, got list"),
        ({"distil": {}}, "parts are distill, base, .*; got 'distil'"),
        ({"distill": {"folder": "x"}}, "of distill may be said path, and of a model preset or config"),
        ({"distill": {"preset": "tiny", "config": {}}}, "of distill may be said"),
        ({"distill": {"path": 3}}, "of distill, path and preset must be text"),
        ({"defaults": {"seed": 3}}, "defaults may hold seconds, resolution, aspect, stages; got {'seed': 3}"),
        ({"audio_vae": {"preset": "tiny"}}, "of audio_vae, which is no Transformer, path alone"),
    ],
)
def test_a_bad_note_is_named(tmp_path: Path, note: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_layout(folder(tmp_path, "distill", note=note), {})


def test_a_note_may_hold_defaults_of_the_command_line(tmp_path: Path) -> None:
    layout = read_layout(folder(tmp_path, "distill", note={"defaults": {"seconds": 3}, "distill": {}}), {})
    assert layout.defaults == {"seconds": 3} and "defaults" not in layout.noted


def test_a_configuration_that_is_none_is_named(tmp_path: Path) -> None:
    layout = read_layout(folder(tmp_path, "distill", note={"distill": {"config": {"num_layers": 0}}}), {})
    with pytest.raises(CheckpointError, match=r"pipeline.json: config of distill: "):
        layout.model("distill")
