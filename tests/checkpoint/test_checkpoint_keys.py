"""Checkpoints as other tools leave them: prefixed keys, diffusers' names, tied tensors, links, and what is no file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from toy_checkpoint import CONFIG, fails, read_sizes, weights

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.header import read_headers
from happyhorse_fast.checkpoint.load import load, save_checkpoint
from happyhorse_fast.checkpoint.packed import save_packed
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.config import FastConfig

INDEX = "model.safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_model.safetensors"
Keys = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Keys:
    return weights()


def same(path: Path, tensors: Keys) -> None:
    state = load(path, config=CONFIG, progress=False).state_dict()
    assert all(torch.equal(value.to(state[key].dtype), state[key]) for key, value in tensors.items())


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "transformer.", "dit.", "module._orig_mod.", "model.diffusion_model."]
)
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 4000])
def test_a_prefix_that_all_keys_share_is_taken_off(
    prefix: str, max_shard_bytes: int, tensors: Keys, tmp_path: Path
) -> None:
    save_checkpoint({prefix + key: value for key, value in tensors.items()}, tmp_path, max_shard_bytes=max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_bytes > 4000
    same(tmp_path, tensors)
    assert read_sizes(tmp_path)["num_layers"] == CONFIG.num_layers


def test_what_wrappers_put_into_keys_is_taken_out(tensors: Keys, tmp_path: Path) -> None:
    def wrapped(key: str) -> str:
        key = key.replace("block.layers.1.", "block.layers.1._orig_mod.").replace(".mlp.", "._fsdp_wrapped_module.mlp.")
        return "_fsdp_wrapped_module." + key.replace("attention.", "attention._checkpoint_wrapped_module.")

    save_file({wrapped(key): value for key, value in tensors.items()}, tmp_path / "model.safetensors")
    same(tmp_path, tensors)


def test_packed_weights_may_have_a_prefix(tmp_path: Path) -> None:
    config = CONFIG.replace(head_dim=32)
    fast = FastConfig(backend="reference")
    save_checkpoint(HappyHorse(config).init_weights(0), tmp_path / "published")
    model = load(tmp_path / "published", config=config, fast=fast, progress=False)
    save_packed(model, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    save_file({f"module.{key}": value for key, value in load_file(file).items()}, file)
    state = load(tmp_path / "packed", fast=fast, progress=False).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    description = tmp_path / "packed" / "happyhorse_fast.json"
    description.unlink()
    description.symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"happyhorse_fast.json: a link to gone, which is not there"):
        load(tmp_path / "packed", progress=False)
    description.unlink()
    os.mkfifo(description)
    with pytest.raises(CheckpointError, match=r"happyhorse_fast.json: must be a regular file"):
        load(tmp_path / "packed", progress=False)


@pytest.mark.parametrize(
    ("also", "named"),
    [
        (lambda t: {f"ema.{k}": v + 1 for k, v in t.items()}, ("'model.' (", "'ema.' (", "one model alone")),
        (lambda t: {"step": torch.zeros(1)}, ("'model.' (", "1 without, such as step")),
        (lambda t: {f"model._orig_mod.{k}": v + 1 for k, v in t.items()}, ("are the same tensor of a model",)),
    ],
)
def test_keys_of_more_than_a_model_are_named(
    also: Callable[[Keys], Keys], named: tuple[str, ...], tensors: Keys, tmp_path: Path
) -> None:
    save_file({f"model.{key}": value for key, value in tensors.items()} | also(tensors), tmp_path / "model.safetensors")
    fails(tmp_path, str(tmp_path), *named)


@pytest.mark.parametrize("sharded", [False, True])
def test_diffusers_names_are_taken(sharded: bool, tensors: Keys, tmp_path: Path) -> None:
    tmp_path = tmp_path / "transformer"
    save_checkpoint(tensors, tmp_path, max_shard_bytes=4000 if sharded else 1 << 30)
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        if file.name == INDEX:
            content = content.replace(b'"model-', b'"diffusion_pytorch_model-')
        file.unlink()
        (tmp_path / f"diffusion_pytorch_{file.name}").write_bytes(content)
    same(tmp_path, tensors)
    if sharded:
        same(tmp_path / f"{DIFFUSERS}.index.json", tensors)
    fails(tmp_path.parent, f"neither model.safetensors nor {INDEX}", f"its folder {tmp_path.name} has one")
    with pytest.raises(FileExistsError, match="holds a checkpoint"):
        save_checkpoint(tensors, tmp_path)
    save_checkpoint(tensors, tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_index_can_be_named(tensors: Keys, tmp_path: Path) -> None:
    save_checkpoint(tensors, tmp_path, max_shard_bytes=4000)
    (tmp_path / INDEX).rename(tmp_path / "model.bf16.safetensors.index.json")
    fails(tmp_path, "model.bf16.safetensors.index.json", "name one file to load it")
    same(tmp_path / "model.bf16.safetensors.index.json", tensors)


def test_two_checkpoints_in_a_folder_are_named(tensors: Keys, tmp_path: Path) -> None:
    save_checkpoint(tensors, tmp_path)
    save_file(tensors, tmp_path / DIFFUSERS)
    fails(tmp_path, f"holds both model.safetensors and {DIFFUSERS}", "name the file")
    same(tmp_path / DIFFUSERS, tensors)


@pytest.mark.parametrize("kind", ["single", "index", "shard", "path"])
def test_a_link_to_nowhere_says_so(kind: str, tensors: Keys, tmp_path: Path) -> None:
    save_checkpoint(tensors, tmp_path, max_shard_bytes=1 << 30 if kind == "single" else 4000)
    if kind == "path":
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        fails(tmp_path / "link", f"link: a link to {tmp_path}/gone, which is not there")
        return
    name = {"single": "model.safetensors", "index": INDEX}.get(kind, "model-00001-of-")
    file = next(file for file in tmp_path.iterdir() if file.name.startswith(name))
    file.unlink()
    file.symlink_to("../blobs/0123")
    fails(tmp_path, file.name, "a link to ../blobs/0123, which is not there")


def test_a_link_to_a_file_is_followed(tensors: Keys, tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    save_checkpoint(tensors, blobs, max_shard_bytes=4000)
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    same(folder, tensors)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "shard", "path"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(name: str, tensors: Keys, tmp_path: Path) -> None:
    if name == "shard":
        save_checkpoint(tensors, tmp_path, max_shard_bytes=4000)
        name = next(iter(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()))
        (tmp_path / name).unlink()
    file = tmp_path / ("x.safetensors" if name == "path" else name)
    os.mkfifo(file)  # opening it would wait for a writer for ever
    fails(file if name == "path" else tmp_path, file.name, "must be a regular file", "it is a FIFO")
    with pytest.raises(CheckpointError, match="it is a device"):
        read_headers("/dev/zero")
    folder = tmp_path / "folder.safetensors"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.safetensors").mkdir()
    fails(tmp_path / "sub", "must be a regular file", "it is a folder")
    assert not folder.exists()


def test_tied_tensors_are_saved_and_loaded(tensors: Keys, tmp_path: Path) -> None:
    model = HappyHorse(CONFIG)
    model.load_state_dict(tensors)
    model.final_norm_audio.weight = model.final_norm_video.weight
    tied = {key: value.clone() for key, value in model.state_dict().items()}
    save_checkpoint(model, tmp_path / "ours")
    same(tmp_path / "ours", tied)
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == tied.keys()
    (tmp_path / "theirs").mkdir()
    save_model(model, str(tmp_path / "theirs" / "model.safetensors"))  # leaves one out, and says so in metadata
    assert len(load_file(tmp_path / "theirs" / "model.safetensors")) == len(tied) - 1
    same(tmp_path / "theirs", tied)


def test_attention_without_gates_is_named(tensors: Keys, tmp_path: Path) -> None:
    def without(key: str, value: torch.Tensor) -> torch.Tensor:
        if not key.endswith("linear_qkv.weight"):
            return value
        experts = CONFIG.experts(int(key.split(".")[2]))
        return torch.cat([part[: -CONFIG.num_heads_q] for part in value.chunk(experts)])

    save_checkpoint({key: without(key, value) for key, value in tensors.items()}, tmp_path)
    fails(tmp_path, "attention gating is off", "block.layers.0.attention.linear_qkv.weight", "4 more rows per expert")
