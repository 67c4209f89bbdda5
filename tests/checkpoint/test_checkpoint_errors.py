"""Checkpoints that cannot be loaded: one error that names file and key, before any data are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_checkpoint import (
    BANDS,
    CONFIG,
    INDEX,
    QKV,
    edit_file,
    edit_index,
    fails,
    index_of,
    read_sizes,
    shard_of,
    weights,
    with_header,
)

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint import stream as streaming
from happyhorse_fast.checkpoint.load import load, save_checkpoint
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.sizes import WITNESS


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """The same model in one file."""
    save_checkpoint(weights(), tmp_path / "single")
    return tmp_path / "single" / "model.safetensors"


@pytest.fixture
def no_data_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("data were read before all headers were checked")

    monkeypatch.setattr(streaming, "_read_exactly", read)


def test_exactly_one_of_preset_and_config(single: Path) -> None:
    for given_ in ({}, {"preset": "tiny", "config": CONFIG}):
        with pytest.raises(ValueError, match=r"exactly one of preset and config.*local_attn_layers") as caught:
            load(single, **given_)  # type: ignore[arg-type]
        for name in ("frame_receptive_field", "coords_style", "davinci-magihuman-sr-1080p"):
            assert name in str(caught.value)
    with pytest.raises(ValueError, match="preset must be one of"):
        load(single, "no-such")
    with pytest.raises(TypeError, match="config must be a ModelConfig, got dict"):
        load(single, config={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compute_dtype must be one of"):
        load(single, config=CONFIG, compute_dtype=torch.float16)
    for device in ("meta", "no-such", "xpu:99"):
        with pytest.raises(ValueError, match=f"device must be .*{device}"):
            load(single, config=CONFIG, device=device)


OTHER_SIZES: dict[str, tuple[Any, str]] = {
    "num_layers": (4, "block.layers.2.attention.pre_norm.weight"),
    "hidden_size": (24, "final_norm_video.weight"),
    "head_dim": (16, "block.layers.0.attention.q_norm.weight"),
    "num_heads_q": (2, "block.layers.0.attention.linear_proj.weight"),
    "num_heads_kv": (1, "block.layers.0.attention.linear_qkv.weight"),
    "video_in_channels": (4, "adapter.video_embedder.weight"),
    "audio_in_channels": (5, "adapter.audio_embedder.weight"),
    "text_in_channels": (7, "adapter.text_embedder.weight"),
    "mm_layers": ((0, 2), "block.layers.2.attention.pre_norm.weight"),
    "gelu7_layers": ((), "block.layers.0.mlp.down_proj.weight"),
    "post_norm_layers": ((), "block.layers.1.attn_post_norm.weight"),
}


@pytest.mark.usefixtures("no_data_read")
@pytest.mark.parametrize("field", WITNESS)
def test_other_size_than_the_configurations(field: str, folder: Path) -> None:
    value, key = OTHER_SIZES[field]
    message = fails(folder, key, str(shard_of(folder, key)), config=CONFIG.replace(**{field: value}))
    shown = [list(v) if isinstance(v, tuple) else v for v in (getattr(CONFIG, field), value)]
    assert f"{field}: the checkpoint has {shown[0]} (" in message and f"config says {shown[1]}" in message
    assert message.count("the checkpoint has") == 1, message


@pytest.mark.usefixtures("no_data_read")
def test_other_sizes_are_listed_together_and_name_the_preset(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder, "davinci-magihuman", progress=False)
    for line in ("num_layers: the checkpoint has 3", "preset 'davinci-magihuman' says 40", "head_dim: the checkpoint"):
        assert line in str(caught.value)
    # A layer that the checkpoint does not have is the matter of num_layers alone.
    message = fails(folder, "num_layers: the checkpoint has 3", config=CONFIG.replace(num_layers=4, mm_layers=(0, 3)))
    assert message.count("the checkpoint has") == 1, message


def test_sizes_alone(folder: Path, single: Path) -> None:
    assert read_sizes(folder) == read_sizes(single)
    edit_file(single, lambda tensors: tensors.update({QKV: tensors[QKV][:-1].clone()}))
    with pytest.raises(CheckpointError, match=QKV):
        read_sizes(single)


def every_float_tensor() -> list[str]:
    return list(HappyHorse(CONFIG, device="meta").state_dict())


@pytest.mark.usefixtures("no_data_read")
@pytest.mark.parametrize("key", every_float_tensor())
def test_one_missing_misshapen_or_integer_tensor(key: str, single: Path) -> None:
    good = weights()[key]
    if key != BANDS:
        edit_file(single, lambda tensors: tensors.pop(key))
        assert f"tensors missing from {single} (1): {key}" in fails(single)
    for bad in (torch.cat([good, good[:1]]), good.unsqueeze(0), good[..., :-1] if good.dim() > 1 else good[:-1]):
        save_file({**weights(), key: bad.clone()}, single)
        assert f"{key} in {single} is {list(bad.shape)}" in fails(single)
    save_file({**weights(), key: torch.zeros_like(good, dtype=torch.int8)}, single)
    assert f"tensors of a dtype other than BF16, F16, F32, F64 (1): {key} in {single} is I8" in fails(single)


@pytest.mark.usefixtures("no_data_read")
def test_problems_of_a_kind_are_listed_together(single: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if k.startswith("block.layers.1.")]:
            del tensors[key]
        tensors["block.layers.0.extra"] = torch.zeros(1)
        tensors["block.layers.9999.attention.pre_norm.weight"] = torch.zeros(16)
        tensors[BANDS] = tensors[BANDS].to(torch.float8_e4m3fn)

    edit_file(single, change)
    message = fails(single, "tensors missing", "(8): block.layers.1.attention.pre_norm.weight;", "and 3 more")
    assert "block.layers.1.mlp.down_proj.weight" not in message  # the last of the eight
    assert f"unexpected tensors (2): block.layers.0.extra in {single}; block.layers.9999." in message
    assert f"{BANDS} in {single} is F8_E4M3" in message


@pytest.mark.usefixtures("no_data_read")
def test_foreign_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(2, 2)}, file)
    fails(
        file, f"unexpected tensors (1): blocks.0.attn.qkv.weight in {file}", "missing", "adapter.video_embedder.weight"
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weight(value: float, folder: Path) -> None:
    file = shard_of(folder, QKV)
    edit_file(file, lambda tensors: tensors[QKV].view(-1)[-2:].fill_(value))
    fails(folder, str(file), f"{QKV} holds 2 NaN or Inf")


def test_weight_too_large_for_its_dtype(single: Path) -> None:
    edit_file(single, lambda tensors: tensors.update({QKV: tensors[QKV].double().fill_(1e300)}))
    fails(single, str(single), QKV, "stored as F64, read as torch.bfloat16")


@pytest.mark.usefixtures("no_data_read")
def test_no_such_checkpoint(tmp_path: Path) -> None:
    fails(tmp_path / "absent", str(tmp_path / "absent"), "no such folder or file")
    fails(tmp_path, str(tmp_path), "no safetensors file", "model.safetensors.index.json")
    save_file({"a": torch.zeros(1)}, tmp_path / "shard-1.safetensors")
    fails(tmp_path, "shard-1.safetensors", "name one file")
    (tmp_path / "notes.txt").write_text("x")
    fails(tmp_path / "notes.txt", "notes.txt", "a checkpoint is a folder or a .safetensors file")


@pytest.mark.usefixtures("no_data_read")
def test_ambiguous_folder(folder: Path, single: Path) -> None:
    (folder / "model.safetensors").write_bytes(single.read_bytes())
    fails(folder, str(folder), "both model.safetensors and model.safetensors.index.json")


@pytest.mark.usefixtures("no_data_read")
@pytest.mark.parametrize("in_zip", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".pkl"])
def test_pickle_is_refused(suffix: str, in_zip: bool, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    torch.save(weights(), file, _use_new_zipfile_serialization=in_zip)
    reason = "can run code"
    fails(file, str(file), reason, "convert it to safetensors")
    fails(tmp_path, f"weights{suffix}", reason)
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(file.read_bytes())
    fails(tmp_path, str(disguised), reason)
    disguised.unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {QKV: file.name}}))
    fails(tmp_path, INDEX, file.name, reason)


@pytest.mark.usefixtures("no_data_read")
def test_truncated_shard(folder: Path) -> None:
    file = shard_of(folder, QKV)
    raw = file.read_bytes()
    last = max(load_file(file), key=lambda key: json.loads(raw[8 : raw.index(b"}}") + 2])[key]["data_offsets"])
    for size in (len(raw) - 1, len(raw) // 2):
        file.write_bytes(raw[:size])
        fails(folder, str(file), f"truncated: {size} of {len(raw)} bytes", last)
    for size, reason in ((100, "92 are there"), (8, "0 are there"), (5, "5 bytes"), (0, "0 bytes")):
        file.write_bytes(raw[:size])
        fails(folder, str(file), "truncated", reason)
    file.write_bytes(raw + b"\0\0")
    fails(folder, str(file), "2 bytes after the end")


def test_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = sorted(folder.glob("model-*"))[-1]
    fill = streaming.TensorReader.fill

    def shrink(*args: Any) -> None:
        last.write_bytes(last.read_bytes()[:-1])
        monkeypatch.undo()
        fill(*args)

    monkeypatch.setattr(streaming.TensorReader, "fill", shrink)
    fails(folder, str(last), "truncated while it was read, within ")


HEADER_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "not an entry": (lambda h: h.update({QKV: 3}), QKV),
    "no dtype": (lambda h: h[QKV].pop("dtype"), QKV),
    "negative size": (lambda h: h[QKV].update(shape=[-68, -16]), QKV),
    "fraction as size": (lambda h: h[QKV].update(shape=[136, 8.0]), QKV),
    "reversed offsets": (lambda h: h[QKV].update(data_offsets=h[QKV]["data_offsets"][::-1]), QKV),
    "too few bytes": (lambda h: h[QKV].update(shape=[68, 17]), QKV),
    "hole": (lambda h: h.pop(min(h, key=lambda k: h[k].get("data_offsets", [9e9]))), "starts at byte"),
}


@pytest.mark.usefixtures("no_data_read")
@pytest.mark.parametrize("name", HEADER_CHANGES)
def test_corrupt_header(name: str, single: Path) -> None:
    change, named = HEADER_CHANGES[name]
    with_header(single, change)
    fails(single, str(single), "corrupt header", named)


@pytest.mark.usefixtures("no_data_read")
def test_file_that_is_no_safetensors(single: Path) -> None:
    for content, reason in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<html><body>404</body></html>", "not a safetensors file"),
        ((4).to_bytes(8, "little") + b"{,,}", "corrupt header"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc", "corrupt header"),
        ((2).to_bytes(8, "little") + b"[]", "corrupt header: must be a JSON object, got list"),
        ((16).to_bytes(8, "little") + b'{"a": 1, "a": 2}', "the same key twice: a"),
    ):
        single.write_bytes(content)
        fails(single, str(single), reason)


@pytest.mark.usefixtures("no_data_read")
def test_missing_shards(folder: Path) -> None:
    gone = [shard_of(folder, QKV), shard_of(folder, "final_linear_audio.weight")]
    for file in gone:
        file.unlink()
    first = [next(k for k, name in index_of(folder)["weight_map"].items() if name == file.name) for file in gone]
    fails(folder, INDEX, "2 of ", *first, *(file.name for file in gone))


@pytest.mark.usefixtures("no_data_read")
def test_index_that_disagrees_with_its_shards(folder: Path) -> None:
    right, first = shard_of(folder, QKV).name, sorted(folder.glob("model-*"))[0].name
    assert right != first
    edit_index(folder, lambda w: w.update({QKV: first, "block.layers.7.x": first}))
    fails(folder, INDEX, f"{QKV} in {first} (it is in {right}); block.layers.7.x in {first} (no shard has it)")
    edit_index(folder, lambda w: (w.pop("block.layers.7.x"), w.pop(QKV)))
    fails(folder, INDEX, "not in the index", f"{QKV} in {right}")


@pytest.mark.usefixtures("no_data_read")
def test_key_in_two_shards(folder: Path) -> None:
    right, first = shard_of(folder, QKV), sorted(folder.glob("model-*"))[0]
    edit_file(first, lambda tensors: tensors.update({QKV: weights()[QKV]}))
    fails(folder, INDEX, f"keys in several shards (1): {QKV} in {first.name} and {right.name}")


@pytest.mark.usefixtures("no_data_read")
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"weight_map": {', "corrupt index"),
        ("\xff", "corrupt index"),
        ("[]", "must be a JSON object, got list"),
        ("{}", 'no "weight_map"'),
        ('{"weight_map": {}}', 'no "weight_map"'),
        ('{"weight_map": {"a.key": 3}}', "a.key: 3"),
        ('{"weight_map": {"a.key": "x.safetensors", "a.key": "y.safetensors"}}', "the same key twice: a.key"),
        ('{"weight_map": {"a.key": "../x.safetensors"}}', "'../x.safetensors'"),
        ('{"weight_map": {"a.key": "/x.safetensors"}}', "'/x.safetensors'"),
        ('{"weight_map": {"a.key": "x.json"}}', "'x.json'"),
    ],
)
def test_corrupt_index(content: str, named: str, folder: Path) -> None:
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    fails(folder, str(folder / INDEX), named)
