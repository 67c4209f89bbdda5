"""A small checkpoint for the tests, and ways to damage it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from happyhorse_fast import golden
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.header import read_headers
from happyhorse_fast.checkpoint.load import load
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.sizes import Sizes, sizes_of

CONFIG = ModelConfig(
    num_layers=3,
    hidden_size=16,
    head_dim=8,
    num_heads_q=4,
    num_heads_kv=2,
    video_in_channels=8,
    audio_in_channels=4,
    text_in_channels=6,
    mm_layers=(0,),
    gelu7_layers=(0,),
    post_norm_layers=(1,),
)
INDEX = "model.safetensors.index.json"
BANDS = "adapter.rope.bands"
QKV = "block.layers.1.attention.linear_qkv.weight"


def weights(config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    return golden.recipe_weights(config, seed=1)


def fails(path: Path, *named: str, config: ModelConfig = CONFIG) -> str:
    """Loading raises one CheckpointError with all of ``named`` in it; the message."""
    with pytest.raises(CheckpointError) as caught:
        load(path, config=config, progress=False)
    message = str(caught.value)
    absent = [name for name in named if name not in message]
    assert not absent, f"{absent} not in: {message}"
    return message


def read_sizes(path: str | Path) -> Sizes:
    return sizes_of(read_headers(path), Path(path))


def index_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return content


def shard_of(folder: Path, key: str) -> Path:
    return folder / str(index_of(folder)["weight_map"][key])


def edit_file(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = index_of(folder)
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
