"""The turbo decoder's two files: loaded as published, and what is wrong with them said before anything is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from happyhorse_fast.pipeline import TurboDecoder, turbo_file
from happyhorse_fast.pipeline.turbo_file import SETTINGS_FILE, WEIGHTS_FILE, check_turbo, load_turbo

RECORDED = load_file(Path(__file__).parent / "turbo_tiny_fp32.safetensors")
WEIGHTS = {key: tensor for key, tensor in RECORDED.items() if key.startswith("decoder.")}
SETTINGS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 48,
    "decoder_block_out_channels": [8, 8, 16, 16],
    "decoder_layers_per_block": [2, 2, 2, 3, 3],
    "decoder_spatio_temporal_scaling": [False, True, True, True],
    "decoder_spatio_only": [False, True, False, False],
    "patch_size": 2,
    "use_unpatchify": True,
    "first_chunk_size": 7,
    "step_size": 7,
}


def save(folder, weights=WEIGHTS, settings=SETTINGS, *, name=SETTINGS_FILE, legacy=False):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(settings))
    ema = {f"module.{key}": tensor for key, tensor in weights.items()}
    content = {"ema_state_dict": {**ema, "module.encoder.x": torch.zeros(1)}, "state_dict": {}, "step": 340_000}
    torch.save(content, folder / WEIGHTS_FILE, _use_new_zipfile_serialization=not legacy)
    return folder


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_published_loads(tmp_path, legacy):
    folder = save(tmp_path, legacy=legacy)
    check_turbo(folder)
    loaded = load_turbo(folder, dtype=torch.float32).state_dict()
    assert loaded.keys() == WEIGHTS.keys() and all(loaded[key].equal(WEIGHTS[key]) for key in loaded)
    frames = load_turbo(folder).decode(RECORDED["in.1x2x3"])
    assert frames.dtype == torch.bfloat16
    wanted = TurboDecoder.from_tensors({key: tensor.bfloat16() for key, tensor in WEIGHTS.items()})
    assert frames.equal(wanted.decode(RECORDED["in.1x2x3"]))


def test_a_check_reads_no_weights(tmp_path, monkeypatch):
    folder = save(tmp_path, {**WEIGHTS, "decoder.conv_in.conv.bias": torch.full((16,), torch.nan)})
    check_turbo(folder)
    with pytest.raises(ValueError, match=r"\.ckpt: module\.decoder\.conv_in\.conv\.bias must be finite, got 16 NaN"):
        load_turbo(folder)
    monkeypatch.setattr(turbo_file.torch, "load", lambda *_, mmap, **__: pytest.fail(f"mmap={mmap}"))
    with pytest.raises(pytest.fail.Exception, match="mmap=True"):
        check_turbo(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_size": 5}, r"\.json: not of the turbo decoder: step_size must be 7, got 5"),
        ({"use_unpatchify": None}, "use_unpatchify must be True, got None"),
        ({"decoder_causal": True}, "decoder_causal must be False, got True"),
        ({"decoder_spatio_temporal_scaling": [True] * 4}, "decoder_spatio_temporal_scaling must be"),
        (
            {"decoder_layers_per_block": [2, 2, 2, 3, 4]},
            r"not of the weights .*\.ckpt: decoder_layers_per_block must be",
        ),
        ({"decoder_block_out_channels": [16, 16, 8, 8]}, r"must be \[8, 8, 16, 16\], got \[16, 16, 8, 8\]"),
    ],
)
def test_settings_of_another_decoder_are_refused(tmp_path, change, message):
    folder = save(tmp_path, settings={**SETTINGS, **change})
    for refuses in (check_turbo, load_turbo):
        with pytest.raises(ValueError, match=message):
            refuses(folder)


def test_a_setting_that_only_other_decoders_may_leave_out_is_missed(tmp_path):
    folder = save(tmp_path, settings={key: value for key, value in SETTINGS.items() if key != "step_size"})
    with pytest.raises(ValueError, match="step_size must be 7, it is missing"):
        check_turbo(folder)


def test_weights_of_another_decoder_are_refused_by_key(tmp_path):
    key = "decoder.conv_out.conv.weight"
    folder = save(tmp_path, {**WEIGHTS, key: torch.zeros(3, 8, 3, 3, 3)})
    with pytest.raises(ValueError, match=rf"\.ckpt: turbo decoder: {key} must be \[12, 8, 3, 3, 3\]"):
        check_turbo(folder)
    folder = save(tmp_path, {key: tensor for key, tensor in WEIGHTS.items() if key != "decoder.conv_in.conv.weight"})
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.conv\.weight is missing"):
        check_turbo(folder)


class Runs:
    def __reduce__(self):
        return (print, ("code ran",))


def damage(folder, kind):
    file = folder / WEIGHTS_FILE
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "text":
        file.write_text("nothing of torch's")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "stop":
        file.write_bytes(b"\x80\x02.")
    elif kind == "name":
        file.write_bytes(file.read_bytes().replace(b"decoder.conv_in", b"decoder.\xffonv_in"))
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "code":
        torch.save({"ema_state_dict": Runs()}, file)
    elif kind == "list":
        torch.save([torch.zeros(1)], file)
    elif kind == "no weights":
        file.unlink()
    elif kind == "two":
        shutil.copy(file, folder / "other.ckpt")
        file.rename(folder / "one.ckpt")
    elif kind == "no settings":
        (folder / SETTINGS_FILE).unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "340000.ckpt: truncated, or not a file of torch.save"),
        ("text", "340000.ckpt: truncated, or not a file of torch.save"),
        ("empty", "340000.ckpt: truncated, or not a file of torch.save"),
        ("stop", "340000.ckpt: truncated, or not a file of torch.save with tensors alone: pop from empty list"),
        ("name", "340000.ckpt: truncated, or not a file of torch.save with tensors alone: 'utf-8' codec"),
        ("pointer", "340000.ckpt: a Git LFS pointer"),
        ("code", "not a file of torch.save with tensors alone"),
        ("list", "340000.ckpt: must hold tensors by key, got list"),
        ("no weights", "must hold checkpoint-340000.ckpt, or one .ckpt file under another name; it holds none"),
        ("two", "it holds 2: one.ckpt; other.ckpt"),
        ("no settings", "must hold TurboV3-Wan22-TinyShallow_7_7.json, .* it holds none"),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path, capsys, kind, message):
    folder = save(tmp_path)
    damage(folder, kind)
    with pytest.raises(ValueError, match=message) as raised:
        check_turbo(folder)
    assert "\n" not in str(raised.value)
    assert "code ran" not in capsys.readouterr().out


def test_one_file_under_another_name_will_do(tmp_path):
    folder = save(tmp_path, name="settings.json")
    (folder / WEIGHTS_FILE).rename(folder / "weights.ckpt")
    check_turbo(folder)
