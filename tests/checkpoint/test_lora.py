"""LoRAs of every key style, merged exactly, several at once, and taken out again bit for bit."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_model import DiTModel
from safetensors.torch import save_file

import happyhorse_fast as hh
from happyhorse_fast import golden
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.load import load, save_checkpoint
from happyhorse_fast.checkpoint.lora import merge_lora
from happyhorse_fast.checkpoint.packed import save_packed
from happyhorse_fast.eager import lora as merging
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate, restore
from happyhorse_fast.fast.config import FastConfig

CASE = golden.load_case("local_v1_fp32")
FAST = FastConfig(backend="reference")
# A product of three experts, one of one, and an end in float32.
PATHS = ("block.layers.0.attention.linear_qkv", "block.layers.2.mlp.down_proj", "adapter.video_embedder")
Tensors = dict[str, torch.Tensor]


def model() -> HappyHorse:
    return CASE.model(torch.bfloat16)


def halves(
    seed: int = 0, rank: int = 4, paths: tuple[str, ...] = PATHS
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down [r, in], up [out, r]) by path, in bf16 as trainers save them."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model().named_parameters())
    made = {}
    for path in paths:
        out, inner = weights[f"{path}.weight"].shape
        shapes = (rank, inner), (out, rank)
        down, up = (torch.randn(shape, generator=generator).mul(0.1).bfloat16() for shape in shapes)
        made[path] = down, up
    return made


def keyed(style: str, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    names = {
        "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
        "peft, named": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
        "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
        "diffusers, old": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
        "comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
        "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
        "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    }
    down, up = names[style]
    at = {path: path.replace(".", "_") if style == "kohya" else path for path in pairs}
    return {down.format(at[p]): a for p, (a, _) in pairs.items()} | {up.format(at[p]): b for p, (_, b) in pairs.items()}


def expected(*added: tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float | dict[str, float]]) -> Tensors:
    """A model's tensors with deltas in float32, rounded once."""
    state = {key: value.clone() for key, value in model().state_dict().items()}
    for path in {path for pairs, _ in added for path in pairs}:
        weight = state[f"{path}.weight"]
        total = weight.float()
        for pairs, factor in added:
            down, up = pairs[path]
            total = total + (up.float() @ down.float()) * (factor[path] if isinstance(factor, dict) else factor)
        state[f"{path}.weight"] = total.to(weight.dtype)
    return state


def differing(module: torch.nn.Module, tensors: Tensors) -> list[str]:
    state = module.state_dict()
    assert state.keys() == tensors.keys()
    return [
        key for key, value in tensors.items() if value.dtype != state[key].dtype or not torch.equal(value, state[key])
    ]


STYLES = ("peft", "peft, named", "diffusers", "diffusers, old", "comfy", "bare", "kohya")


@pytest.mark.quick(7)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_every_key_style_is_merged_exactly(style: str, alpha: float | None) -> None:
    pairs = halves()
    tensors = keyed(style, pairs)
    if alpha is not None:
        downs = [key for key in tensors if "lora_A" in key or "down" in key]
        tensors |= {key[: key.index(".lora")] + ".alpha": torch.tensor(alpha) for key in downs}
    merged = merge_lora(model(), tensors, 0.75)
    assert differing(merged, expected((pairs, 0.75 * (alpha or 4.0) / 4))) == []
    assert set(differing(merged, model().state_dict())) == {f"{path}.weight" for path in PATHS}


def test_an_accelerated_merged_model_is_the_merged_eager_one() -> None:
    pairs = halves()
    by_hand = model()
    by_hand.load_state_dict(expected((pairs, -0.5)))
    t = [CASE.tensors[f"in.{name}"] for name in ("video", "audio", "text")]
    merged = merge_lora(model(), keyed("peft", pairs), -0.5)
    for ours, theirs in ((merged, by_hand), (accelerate(merged, FAST), accelerate(by_hand, FAST))):
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(ours(*t), theirs(*t), strict=True))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("make", [model, lambda: DiTModel(model())])
def test_several_are_rounded_once_and_restored_bit_for_bit(make: Callable[[], Any], accelerated: bool) -> None:
    first, second = halves(1), halves(2, rank=3)
    merged = make()
    before = {key: value.clone() for key, value in merged.state_dict().items()}
    merge_lora(merged, keyed("kohya", first), 0.5)
    merge_lora(merged, keyed("diffusers", second), np.float32(2.0))
    assert differing(merged, expected((first, 0.5), (second, 2.0))) == []
    if accelerated:
        accelerate(merged, FAST)
    restore(merged)
    assert differing(merged, before) == []
    with pytest.raises(ValueError, match="nothing to restore"):
        restore(merged)
    merge_lora(merged, keyed("kohya", first), 0.5)
    assert differing(merged, expected((first, 0.5))) == []


def write(folder: Path, tensors: Tensors, name: str, config: dict[str, Any] | None = None, **metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata=metadata or None)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "bias": "none"} | config))
    return folder


CONFIG = {"r": 4, "lora_alpha": 6}


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        (CONFIG, (1.5, 1.5, 1.5)),
        (CONFIG | {"use_rslora": True}, (3.0, 3.0, 3.0)),
        (CONFIG | {"alpha_pattern": {"mlp.down_proj": 2, "linear_qkv": 8}}, (2.0, 0.5, 1.5)),
        (CONFIG | {"r": 9, "rank_pattern": {r".*": 4}}, (1.5, 1.5, 1.5)),
    ],
)
def test_a_peft_folder_is_read_with_its_configuration(
    config: dict[str, Any], factors: tuple[float, ...], tmp_path: Path
) -> None:
    pairs = halves()
    folder = write(tmp_path, keyed("peft", pairs), "adapter_model.safetensors", config)
    for source in (folder, str(folder), folder / "adapter_model.safetensors"):
        assert differing(merge_lora(model(), source), expected((pairs, dict(zip(PATHS, factors, strict=True))))) == []


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "any.safetensors"])
def test_a_diffusers_file_is_read_with_its_metadata(name: str, tmp_path: Path) -> None:
    pairs = halves()
    packed = json.dumps({f"transformer.{key}": value for key, value in CONFIG.items()} | {"text_encoder.lora_alpha": 9})
    write(tmp_path, keyed("diffusers", pairs), name, format="pt", lora_adapter_metadata=packed)
    for source in (tmp_path, tmp_path / name):
        assert differing(merge_lora(model(), source, 2.0), expected((pairs, 3.0))) == []


@pytest.mark.parametrize("fast", [None, FAST])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 1 << 18])
def test_merged_while_loading(fast: FastConfig | None, max_shard_bytes: int, tmp_path: Path) -> None:
    save_checkpoint(model(), tmp_path / "base", max_shard_bytes=max_shard_bytes)
    first, second = halves(1), halves(2)
    folder = write(tmp_path / "lora", keyed("peft", first), "adapter_model.safetensors", CONFIG)
    loras = [folder, keyed("kohya", second)]
    loaded = load(tmp_path / "base", config=CASE.config, fast=fast, lora=loras, lora_scale=[1.0, 0.5], progress=False)
    merged = merge_lora(model(), loras, [1.0, 0.5])
    assert differing(merged, expected((first, 1.5), (second, 0.5))) == []
    if fast is not None:
        accelerate(merged, fast)
        with pytest.raises(ValueError, match="were dropped"):
            restore(loaded)
    assert differing(loaded, merged.state_dict()) == []
    with pytest.raises(ValueError, match="keys of modules that the model does not have"):
        load(tmp_path / "base", config=CASE.config, lora={"x.lora_A.weight": torch.ones(1, 1)}, progress=False)
    if fast is not None:
        save_packed(loaded, tmp_path / "packed")
        with pytest.raises(ValueError, match="lora must be left out"):
            load(tmp_path / "packed", lora=loras, progress=False)


@pytest.mark.parametrize("precision", ["medium", "autocast"])
def test_ambient_precision_changes_no_bit(precision: str) -> None:
    # Wide enough for oneDNN, in more bits than bf16 has.
    pairs = {path: (down.float() / 3, up.float() / 3) for path, (down, up) in halves(rank=64).items()}
    wanted = expected((pairs, 1.0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "autocast" else precision)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            merged = merge_lora(model(), keyed("bare", pairs))
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert after == ("highest" if precision == "autocast" else precision)
    assert differing(merged, wanted) == []


def test_ambient_modes_change_no_bit(tmp_path: Path) -> None:
    pairs = halves()
    folder = write(tmp_path, keyed("peft", pairs), "adapter_model.safetensors", CONFIG)
    with torch.inference_mode():
        made = model()
    with torch.device("meta"):
        merge_lora(made, folder)
    assert differing(made, expected((pairs, 1.5))) == []
    assert differing(restore(made), model().state_dict()) == []
    other = model()
    with torch.inference_mode():
        merge_lora(other, folder)
    assert differing(restore(other), model().state_dict()) == []


def test_a_copy_is_restored_for_itself() -> None:
    merged = merge_lora(model(), keyed("bare", halves()))
    other = copy.deepcopy(merged)
    restore(merged)
    assert differing(merged, model().state_dict()) == []
    assert differing(other, expected((halves(), 1.0))) == []
    assert differing(restore(other), model().state_dict()) == []


def test_tensors_that_a_trainer_goes_on_with_stay_as_they_were_merged() -> None:
    first, second = keyed("diffusers", halves(1)), keyed("diffusers", halves(2))
    trained = {key: torch.nn.Parameter(value.clone()) * 1.0 for key, value in first.items()}
    merged, wanted = merge_lora(model(), trained), merge_lora(model(), [first, second])
    for value in trained.values():
        value.detach().zero_()
    assert differing(copy.deepcopy(merge_lora(merged, second)), wanted.state_dict()) == []


def test_weights_changed_since_are_named() -> None:
    merged = merge_lora(model(), keyed("bare", halves()))
    other = HappyHorse(CASE.config).init_weights(7).state_dict()
    merged.load_state_dict(other)
    for then in (lambda: restore(merged), lambda: merge_lora(merged, keyed("bare", halves(1)))):
        with pytest.raises(ValueError, match=r"weight was changed after merge_lora"):
            then()
    assert differing(merged, {key: value.to(merged.state_dict()[key].dtype) for key, value in other.items()}) == []


def test_an_interruption_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = merge_lora(model(), keyed("bare", halves(1)), 0.5)
    calls = []
    real = merging._bits

    def interrupted(weight: torch.Tensor) -> torch.Tensor:
        calls.append(weight)
        if len(calls) == 5:  # two per weight: within the last
            raise KeyboardInterrupt
        return real(weight)

    monkeypatch.setattr(merging, "_bits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_lora(merged, keyed("bare", halves(2)))
    assert differing(merged, expected((halves(1), 0.5))) == []
    huge = {key: value * 1e30 for key, value in keyed("bare", halves(2)).items()}
    with pytest.raises(ValueError, match=r"video_embedder.weight would hold NaN or Inf"):
        merge_lora(merged, huge)
    assert differing(merged, expected((halves(1), 0.5))) == []
    assert differing(restore(merged), model().state_dict()) == []


def test_an_interrupted_restore_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = merge_lora(model(), keyed("bare", halves()))
    real = merging._copy

    def interrupted(weight: torch.Tensor, value: torch.Tensor) -> None:
        real(weight, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore(merged)
    monkeypatch.undo()
    assert differing(restore(merged), model().state_dict()) == []
    assert differing(merge_lora(merged, keyed("bare", halves(2))), expected((halves(2), 1.0))) == []


QKV, DOWN = PATHS[:2]


def without(key: str) -> Callable[[Tensors], object]:
    return lambda t: t.pop(key)


def replaced(key: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda t: t.update({key: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replaced("block.layers.99.mlp.down_proj.lora_A.weight", torch.ones(4, 4)), ("does not have (1)", "layers.99")),
        (replaced("text_encoder.block.lora_A.weight", torch.ones(4, 4)), ("does not have (1)", "text_encoder.block")),
        (
            replaced(f"{DOWN}.lora_magnitude_vector.weight", torch.ones(4)),
            ("no keys of one (1)", f"{DOWN}.lora_mag"),
        ),
        (replaced(f"{DOWN}.dora_scale", torch.ones(4)), ("no keys of one (1)", f"{DOWN}.dora_scale")),
        (replaced(f"{DOWN}.hada_w1_a", torch.ones(4)), ("no keys of one (1)", f"{DOWN}.hada_w1_a")),
        (replaced(f"{DOWN}.lora_B.bias", torch.ones(4)), ("no keys of one (1)", f"{DOWN}.lora_B.bias")),
        (without(f"{DOWN}.lora_B.weight"), ("no other half for", f"{DOWN}.lora_A.weight")),
        (without(f"{QKV}.lora_A.weight"), ("no other half for", f"{QKV}.lora_B.weight")),
        (
            replaced("block.layers.1.mlp.down_proj.alpha", torch.ones(1)),
            ("no other half", "layers.1.mlp.down_proj.alpha"),
        ),
        (replaced(f"{DOWN}.lora_A.weight", torch.ones(4, 7)), (DOWN, "must be for [out, in] features", "7]")),
        (replaced(f"{DOWN}.lora_A.weight", torch.ones(5, 4)), (f"{DOWN}.lora_A.weight must be [rank, in", "[5, 4]")),
        (replaced(f"{DOWN}.lora_A.weight", torch.ones(4, 4, 1, 1)), (f"{DOWN}.lora_A.weight must be [rank, in",)),
        (
            replaced(f"{DOWN}.lora_A.weight", torch.ones(4, 4, dtype=torch.int8)),
            (f"{DOWN}.lora_A.weight", "torch.int8"),
        ),
        (replaced(f"{DOWN}.lora_A.weight", torch.full((4, 4), math.nan)), (f"{DOWN}.lora_A.weight", "NaN or Inf")),
        (replaced(f"{DOWN}.lora_A.weight", torch.ones(4, 4, device="meta")), (f"{DOWN}.lora_A.weight", "meta")),
        (replaced(f"{DOWN}.alpha", torch.ones(2)), (f"{DOWN}.alpha must be one number",)),
        (replaced(f"transformer.{DOWN}.lora_A.weight", torch.ones(4, 4)), ("for the same weight", f"{DOWN}.lora_A")),
        (
            replaced(f"lora_unet_{DOWN.replace('.', '_')}.lora_down.weight", torch.ones(4, 4)),
            ("for the same weight", "lora_unet_block_layers_2"),
        ),
        (lambda t: t.clear(), ("must hold a LoRA",)),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    change: Callable[[Tensors], object], named: tuple[str, ...]
) -> None:
    tensors = keyed("bare", halves())
    change(tensors)
    merged = model()
    with pytest.raises(ValueError, match="lora") as caught:
        merge_lora(merged, tensors)
    assert [name for name in named if name not in str(caught.value)] == [], str(caught.value)
    assert differing(merged, model().state_dict()) == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (CONFIG | {"use_dora": True}, "use_dora=True"),
        (CONFIG | {"peft_type": "LOHA"}, "peft_type='LOHA'"),
        (CONFIG | {"bias": "all"}, "bias='all'"),
        (CONFIG | {"modules_to_save": ["x"]}, "modules_to_save=['x']"),
        (CONFIG | {"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        (CONFIG | {"init_lora_weights": "pissa_niter_4"}, "over changed base weights"),
        (CONFIG | {"r": 8}, "video_embedder.lora_A.weight is of rank 4, its configuration says 8"),
        ({"r": 4}, "must have numbers r and lora_alpha"),
        (None, "alpha is not known, adapter_config.json is missing"),
    ],
)
def test_configurations_that_cannot_be_merged_are_named(
    config: dict[str, Any] | None, named: str, tmp_path: Path
) -> None:
    write(tmp_path, keyed("peft", halves()), "adapter_model.safetensors", config)
    merged = model()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors") as caught:
        merge_lora(merged, tmp_path)
    assert named in str(caught.value)
    assert differing(merged, model().state_dict()) == []


def test_sources_that_are_none(tmp_path: Path) -> None:
    merged = model()
    for source, message in (
        (tmp_path / "absent.safetensors", "absent.safetensors"),
        (tmp_path, "no .safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge_lora(merged, source)
    write(tmp_path, keyed("kohya", halves()), "a.safetensors")
    write(tmp_path, keyed("kohya", halves()), "b.safetensors")
    with pytest.raises(CheckpointError, match=r"it holds a.safetensors; b.safetensors: name the file"):
        merge_lora(merged, tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a.safetensors: truncated"):
        merge_lora(merged, tmp_path / "a.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"lora.bin: a LoRA is a folder or a .safetensors file"):
        merge_lora(merged, tmp_path / "lora.bin")
    folder = write(tmp_path / "peft", keyed("peft", halves()), "adapter_model.safetensors", CONFIG)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: corrupt"):
        merge_lora(merged, folder)


def test_misuse_is_named() -> None:
    tensors = keyed("bare", halves())
    for scale in (True, "1", None):
        with pytest.raises(TypeError, match="scale must be a number"):
            merge_lora(model(), tensors, scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be finite"):
        merge_lora(model(), tensors, math.inf)
    with pytest.raises(TypeError, match="lora must be a folder, a file or tensors by key, got int"):
        merge_lora(model(), [tensors, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one for each of the 2 LoRAs, got 1"):
        merge_lora(model(), [tensors, tensors], [1.0])
    with pytest.raises(ValueError, match=r"model must hold data, .*weight is on the meta device"):
        merge_lora(model().to("meta"), tensors)
    with pytest.raises(TypeError, match="must map keys to tensors"):
        merge_lora(model(), {"a": 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="model must be a HappyHorse"):
        merge_lora({}, tensors)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got Linear$"):
        merge_lora(torch.nn.Linear(2, 2), tensors)
    with pytest.raises(TypeError, match="got DataParallel around one"):
        merge_lora(torch.nn.DataParallel(model()), tensors)
    with pytest.raises(ValueError, match=r"must not be accelerated.*call restore\(model\)"):
        merge_lora(accelerate(model(), FastConfig(precision="fp8", backend="reference")), tensors)
    tied = model()
    tied.block.layers[3].mlp.down_proj = tied.block.layers[2].mlp.down_proj  # type: ignore[union-attr]
    tied.block.layers[3].mlp.down_proj = copy.copy(tied.block.layers[2].mlp.down_proj)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"down_proj.weight is tied to another module's"):
        merge_lora(tied, tensors)
    adapters = keyed("peft, named", halves())
    other = {key.replace("default", "second").replace("layers.2", "layers.3"): v for key, v in adapters.items()}
    with pytest.raises(ValueError, match="for the same weight: merge one LoRA at a time"):
        merge_lora(model(), adapters | other)
    assert hh.merge_lora is merge_lora
