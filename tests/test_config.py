"""Configurations and token counts: what is published, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.tokens import ClipTokens, fps_of, tokens_for

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 160, "head_dim": 32, "num_heads_q": 5, "num_heads_kv": 1}


def test_the_full_model_is_as_published() -> None:
    config = ModelConfig.preset("davinci-magihuman")
    assert (config.num_layers, config.hidden_size, config.head_dim) == (40, 5120, 128)
    assert (config.num_heads_q, config.num_heads_kv, config.text_in_channels) == (40, 8, 3584)
    assert config.qkv_features == 7208
    assert (config.up_features(0), config.up_features(4)) == (20480, 27304)
    assert (config.intermediate_size(0), config.intermediate_size(39)) == (20480, 13652)
    assert [i for i in range(40) if config.experts(i) == 3] == [0, 1, 2, 3, 36, 37, 38, 39]
    assert config.latent_channels == 48


def test_which_preset_has_a_window() -> None:
    dense = [i for i in range(40) if i not in ModelConfig.preset("davinci-magihuman-sr-1080p").local_attn_layers]
    assert dense == [3, 7, 11, 15, 19, 23, 27, 31]
    horse = ModelConfig.preset("happyhorse-1.0-15b")
    for aspect in ("16:9", "9:16", "1:1"):
        assert horse.is_local(0, tokens_for("1080p", aspect).frame_tokens)
        assert not horse.is_local(0, tokens_for("540p", aspect).frame_tokens)
    assert not horse.is_local(3, 2040)
    assert ModelConfig.preset("davinci-magihuman-sr-1080p").is_local(0, 1)
    for name in ("happyhorse-1.0-15b-dense", "davinci-magihuman", "davinci-magihuman-sr-540p"):
        assert ModelConfig.preset(name).local_attn_layers == ()
    styles = {name: ModelConfig.preset(name).coords_style for name in ModelConfig.preset_names()}
    assert {name for name, style in styles.items() if style == "v1"} == {
        "davinci-magihuman-sr-540p",
        "davinci-magihuman-sr-1080p",
    }


@pytest.mark.parametrize("name", ModelConfig.preset_names())
def test_presets_survive_json(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"hidden_size": 16.0}, TypeError, "hidden_size must be an integer, at least 1; got 16.0 of type float"),
        ({"head_dim": 20}, ValueError, "head_dim must be a multiple of 8 .* got 20"),
        ({"num_heads_kv": 2}, ValueError, "num_heads_kv must divide num_heads_q, got num_heads_kv=2 and num_heads_q=5"),
        ({"video_in_channels": 190}, ValueError, "video_in_channels must be a multiple of 4 .* got 190"),
        ({"mm_layers": (4,)}, ValueError, "mm_layers names layer 4, but there are num_layers=4"),
        ({"mm_layers": 3}, TypeError, "mm_layers must be a list of layer numbers, got 3"),
        ({"gelu7_layers": (1, 1)}, ValueError, "gelu7_layers names a layer twice"),
        ({"local_attn_layers": (-1,)}, ValueError, "must be at least 0, got -1"),
        ({"coords_style": "v3"}, ValueError, 'coords_style must be "v1" or "v2", got \'v3\''),
        ({"frame_receptive_field": -1}, ValueError, "frame_receptive_field must be at least 0, got -1"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ModelConfig(**SIZES | change)


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"one of happyhorse-1.0-15b, .*tiny; got 'happyhorse'"):
        ModelConfig.preset("happyhorse")


def test_published_clips() -> None:
    clips = {
        ("1080p", 5, 24): (31, 63240, 64001),
        ("1080p", 5, 25): (32, 65280, 66046),
        ("1080p", 10, 24): (61, 124440, 125321),
        ("1080p", 15, 24): (91, 185640, 186641),
    }
    for (resolution, seconds, fps), (frames, video, total) in clips.items():
        clip = tokens_for(resolution, "16:9", seconds, fps)
        assert (clip.T, clip.video, clip.total()) == (frames, video, total)
    assert tokens_for("1080p", "16:9").pixels == (1088, 1920)
    assert tokens_for("540p", "9:16").pixels == (896, 512)
    assert tokens_for("256p", "1:1").pixels == (256, 256)


@given(
    st.sampled_from(["1080p", "540p", "256p"]),
    st.sampled_from(["16:9", "9:16", "1:1"]),
    st.integers(3, 15),
    st.sampled_from([24, 25]),
)
def test_every_clip_can_be_cut_into_patches(resolution: str, aspect: str, seconds: int, fps: int) -> None:
    clip = tokens_for(resolution, aspect, seconds, fps)
    t, h, w, audio = clip
    assert isinstance(clip, ClipTokens)
    assert h % 2 == w % 2 == 0
    assert audio == seconds * fps + 1
    assert clip.video == t * (h // 2) * (w // 2)
    assert 4 * (t - 1) + 1 <= audio < 4 * t + 1
    assert tokens_for(resolution, aspect, float(seconds), fps) == clip  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("720p",), "resolution must be one of 1080p, 540p, 256p; got '720p'"),
        ((["1080p"],), r"resolution must be one of 1080p, 540p, 256p; got \['1080p'\]"),
        (("1080p", "4:3"), "aspect must be one of 16:9, 9:16, 1:1; got '4:3'"),
        (("1080p", "16:9", 2), "seconds must be a whole number from 3 to 15; got 2"),
        (("1080p", "16:9", 16), "got 16"),
        (("1080p", "16:9", 5.5), "got 5.5"),
        (("1080p", "16:9", float("nan")), "got nan"),
        (("1080p", "16:9", True), "got True"),
        (("1080p", "16:9", "5"), "got '5'"),
        (("1080p", "16:9", 5, 30), "fps must be one of 24, 25; got 30"),
    ],
)
def test_clips_that_are_refused(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tokens_for(*arguments)


def test_presets_of_the_public_checkpoints_mean_25_frames_a_second() -> None:
    found = {name: fps_of(name) for name in ModelConfig.preset_names()}
    assert {name for name, fps in found.items() if fps == 25} == {
        "davinci-magihuman", "davinci-magihuman-sr-540p", "davinci-magihuman-sr-1080p"
    }  # fmt: skip
    assert set(found.values()) == {24, 25} and fps_of(None) == 24
