"""Accelerating while loading, and packed weights on disk."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from public_model import DiTModel
from safetensors.torch import load_file, save_file

import happyhorse_fast as hh
from happyhorse_fast import golden
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.load import load, save_checkpoint
from happyhorse_fast.checkpoint.packed import is_packed, save_packed
from happyhorse_fast.checkpoint.stream import STAGING_BYTES
from happyhorse_fast.fast.accelerate import accelerate, restore
from happyhorse_fast.fast.config import FastConfig, TopK
from happyhorse_fast.fast.memory import StorageMeter

FAST = FastConfig(precision="fp8", attention="bf16", skip=["down:0"], sparsity=TopK(0.5), backend="reference")


@pytest.fixture(scope="module")
def case() -> golden.GoldenCase:
    return golden.load_case("postnorm_v2_fp32")


@pytest.fixture
def packed(case: golden.GoldenCase, tmp_path: Path) -> Path:
    save_packed(accelerate(case.model(torch.bfloat16), FAST), tmp_path / "packed", max_shard_bytes=1 << 20)
    return tmp_path / "packed"


def run(model: torch.nn.Module, case: golden.GoldenCase) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        video, audio = model(*(case.tensors[f"in.{name}"] for name in ("video", "audio", "text")))
    return video, audio


def test_packed_weights_give_the_same_bits(case: golden.GoldenCase, packed: Path) -> None:
    assert is_packed(packed)
    assert (packed / "model.safetensors.index.json").is_file()
    model = load(packed, fast=FAST, progress=False)
    expected = run(accelerate(case.model(torch.bfloat16), FAST), case)
    assert all(torch.equal(a, b) for a, b in zip(run(model, case), expected, strict=True))
    assert model.fast.fast == FAST  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="were dropped"):
        restore(model)


def test_changed_rotary_frequencies_are_packed_too(case: golden.GoldenCase, tmp_path: Path) -> None:
    model = case.model(torch.bfloat16)
    model.adapter.rope.bands.mul_(0.5)
    save_packed(accelerate(model, FAST), tmp_path)
    found, expected = run(load(tmp_path, fast=FAST, progress=False), case), run(model, case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_loading_accelerated_gives_the_same_bits(case: golden.GoldenCase, tmp_path: Path) -> None:
    save_checkpoint(case.model(torch.bfloat16), tmp_path, max_shard_bytes=1 << 19)
    model = hh.load(tmp_path, config=case.config, fast=FAST, progress=False)
    expected = run(accelerate(case.model(torch.bfloat16), FAST), case)
    assert all(torch.equal(a, b) for a, b in zip(run(model, case), expected, strict=True))


def test_loading_accelerated_holds_one_published_layer(case: golden.GoldenCase, tmp_path: Path) -> None:
    config = case.config.replace(
        num_layers=16, mm_layers=(), gelu7_layers=(), post_norm_layers=(), local_attn_layers=()
    )
    model = hh.HappyHorse(config)
    save_checkpoint(model, tmp_path)
    published = sum(p.nbytes for p in model.parameters())
    layer = max(sum(p.nbytes for p in part.parameters()) for part in model.block.layers)
    with StorageMeter() as meter:
        loaded = load(tmp_path, config=config, fast=FAST, progress=False)
    kept = sum(t.nbytes for t in loaded.state_dict().values())
    # One published layer, its largest weight in float32 while it is quantised, and the staging buffer.
    assert meter.peak_bytes - STAGING_BYTES < kept + 4 * layer < published


def test_packed_weights_carry_their_configuration(packed: Path, case: golden.GoldenCase) -> None:
    with pytest.raises(ValueError, match=r"preset and config must be left out: the folder '.*packed' is packed"):
        load(packed, config=case.config)


@pytest.mark.filterwarnings("ignore:every op runs")
def test_weights_packed_without_a_gpu_are_not_bound_to_plain_torch(packed: Path) -> None:
    model = load(packed, progress=False)
    assert model.fast.fast == dataclasses.replace(FAST, backend="auto")  # type: ignore[union-attr]


def test_what_is_not_packed_can_be_changed(packed: Path) -> None:
    fast = dataclasses.replace(FAST, sparsity=None, exact_first_steps=2, mlp_rows=None, attention="fp8")
    assert load(packed, fast=fast, progress=False).fast.fast == fast  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": ()}, "down of layer 0 is bf16 there, fast asks for fp8"),
        ({"precision": "int8"}, "qkv of layer 0 is fp8 there, fast asks for int8"),
    ],
)
def test_what_is_packed_cannot(packed: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(packed, fast=dataclasses.replace(FAST, **change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_compute_dtype_is_refused(packed: Path, case: golden.GoldenCase, dtype: torch.dtype) -> None:
    """Fast layers have the published rounding points; to take float32 and not use it would mislead."""
    with pytest.raises(ValueError, match=r"compute_dtype must be torch\.bfloat16 with fast"):
        load(packed, compute_dtype=dtype)
    with pytest.raises(ValueError, match=r"compute_dtype must be torch\.bfloat16 with fast"):
        load(packed.parent, config=case.config, compute_dtype=dtype, fast=FAST)


def test_an_accelerated_model_is_not_a_published_checkpoint(case: golden.GoldenCase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use save_packed, or restore"):
        save_checkpoint(accelerate(case.model(torch.bfloat16), FAST), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_as_readable_as_the_umask_allows(packed: Path) -> None:
    (packed / "probe").touch()
    assert {file.stat().st_mode for file in packed.iterdir()} == {(packed / "probe").stat().st_mode}


def _edit(packed: Path, **changes: object) -> None:
    file = packed / "happyhorse_fast.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_format_is_refused(packed: Path) -> None:
    _edit(packed, format=99)
    with pytest.raises(CheckpointError, match="packed format 99, this version reads 1"):
        load(packed)


def test_a_corrupt_description_is_refused(packed: Path) -> None:
    (packed / "happyhorse_fast.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"happyhorse_fast\.json: not a description"):
        load(packed)


@pytest.mark.filterwarnings("ignore:every op runs")
def test_weights_of_another_precision_are_refused(packed: Path) -> None:
    fast = json.loads((packed / "happyhorse_fast.json").read_text())["fast"]
    _edit(packed, fast=fast | {"skip": []})
    with pytest.raises(CheckpointError, match=r"missing 1 tensors: block\.layers\.0\.down_scale"):
        load(packed)


@pytest.mark.filterwarnings("ignore:every op runs")
def test_a_tensor_of_another_dtype_is_refused(packed: Path) -> None:
    key = "block.layers.0.attn_norm"
    file = next(file for file in packed.glob("*.safetensors") if key in load_file(file))
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key].bfloat16()}, file)
    with pytest.raises(CheckpointError, match=rf"differing 1 tensors: {re.escape(key)} in .* is BF16 .*, must be"):
        load(packed)


def test_an_eager_model_is_not_packed(case: golden.GoldenCase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be an accelerated HappyHorse"):
        save_packed(case.model(), tmp_path)


def test_a_model_of_the_public_implementation_is_not_packed(case: golden.GoldenCase, tmp_path: Path) -> None:
    model = accelerate(DiTModel(case.model(torch.bfloat16)), FAST)
    with pytest.raises(ValueError, match=r"got AcceleratedDiTModel of the public .* save_packed what load\("):
        save_packed(model, tmp_path)
