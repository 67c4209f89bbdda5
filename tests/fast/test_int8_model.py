"""`precision="int8"` in a whole model: error, weights on disk, memory, cost, and what runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from unpacking import unpack_linear

from happyhorse_fast import golden
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.budgets import measure
from happyhorse_fast.checkpoint import packed as packed_checkpoint
from happyhorse_fast.checkpoint.load import load
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import GPUS, step_costs, totals
from happyhorse_fast.fast.accelerate import accelerate, empty_accelerated, explain
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.launches import launches_per_layer
from happyhorse_fast.fast.memory import peak_by_kind
from happyhorse_fast.ops.runtime.dispatch import checked_formats, choose
from happyhorse_fast.tokens import tokens_for

FULL = ModelConfig.preset("happyhorse-1.0-15b")
CASES = ["dense_v2_fp32", "local_d128_fp32", "local_v1_fp32", "postnorm_v2_fp32"]
# Measured on the golden cases, random weights of hidden size 160 or 256, with the reference backend: 2.8e-2 at most.
INT8_MODEL_BUDGET = 0.04


def accelerated(case: golden.GoldenCase, **options: Any) -> torch.nn.Module:
    return accelerate(case.model(torch.bfloat16), FastConfig(**{"precision": "int8", "backend": "reference"} | options))


def run(model: torch.nn.Module, case: golden.GoldenCase) -> torch.Tensor:
    given = [case.tensors[f"in.{m}"] for m in ("video", "audio", "text")]
    with torch.no_grad():
        return torch.cat([out.flatten() for out in model(*given)])


def error(result: torch.Tensor, case: golden.GoldenCase) -> float:
    expected = torch.cat([case.tensors[f"out.{m}"].flatten() for m in ("video", "audio")])
    return measure(result, expected.double()).relative_l2


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("attention", ["bf16", "int8_qk"])
def test_the_error_is_as_stated_and_a_third_of_e4m3s(name: str, attention: str) -> None:
    case = golden.load_case(name)
    ours = error(run(accelerated(case, attention=attention), case), case)
    fp8 = error(run(accelerated(case, precision="fp8"), case), case)
    assert ours <= INT8_MODEL_BUDGET and ours < fp8 / 2, (ours, fp8)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("postnorm_v2_fp32", "triton", marks=pytest.mark.slow),
        pytest.param("local_d128_fp32", "triton", marks=pytest.mark.slow),
        ("postnorm_v2_fp32", "cuda"),
    ],
)
def test_kernels_give_what_plain_torch_gives(name: str, backend: str) -> None:
    case = golden.load_case(name)
    plain, kernels = (run(accelerated(case, backend=b, attention="int8_qk"), case) for b in ("reference", backend))
    # They differ by rounding flips, which later layers carry on: less than half of what int8 itself costs.
    assert measure(kernels, plain.double()).relative_l2 < INT8_MODEL_BUDGET / 3
    assert error(kernels, case) <= INT8_MODEL_BUDGET


def test_mlp_in_chunks_gives_the_same_bits() -> None:
    case = golden.load_case("local_v1_fp32")
    assert torch.equal(run(accelerated(case, mlp_rows=128), case), run(accelerated(case, mlp_rows=None), case))


def test_the_mlp_is_in_chunks_by_default() -> None:
    assert FastConfig(precision="int8").rows_in_mlp == 32768
    assert FastConfig(precision="fp8").rows_in_mlp == FastConfig().rows_in_mlp == 65536
    assert FastConfig(precision="int8", mlp_rows=65536).rows_in_mlp == 65536
    assert FastConfig(precision="int8", mlp_rows=None).rows_in_mlp is None
    assert dataclasses.replace(FastConfig(), precision="int8").rows_in_mlp == 32768


def test_downs_weight_went_through_the_hadamard_and_no_other() -> None:
    case = golden.load_case("local_d128_fp32")
    model = case.model(torch.bfloat16)
    published = {key: value.clone() for key, value in model.block.layers[0].state_dict().items()}
    layer: Any = accelerate(model, FastConfig(precision="int8", backend="reference")).block.layers[0]
    for name, key in (("down", "mlp.down_proj.weight"), ("proj", "attention.linear_proj.weight")):
        weight = published[key].float()
        features, inputs = weight.shape[0] // layer.plan.experts, weight.shape[1]
        for through in (True, False):
            if layer.down_weight.shape[2] % 64 and through:
                continue
            packed = getattr(layer, f"{name}_weight")
            if packed.shape[2] % 64:
                continue
            back = unpack_linear(
                packed, getattr(layer, f"{name}_scale"), features=features, inputs=inputs, through_hadamard=through
            )
            near = measure(back.float(), weight.double()).relative_l2
            assert (near < 0.02) == (through == (name == "down")), (name, through, near)


def test_packed_weights_are_saved_and_loaded_as_they_are(tmp_path: Path) -> None:
    case = golden.load_case("dense_v2_fp32")
    model = accelerated(case, attention="int8_qk")
    packed_checkpoint.save_packed(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed", progress=False)
    assert loaded.fast.fast.precision == "int8" and loaded.fast.fast.rows_in_mlp == 32768
    assert loaded.block.layers[0].up_weight.dtype == torch.int8
    assert torch.equal(run(loaded, case), run(model, case))
    with pytest.raises(ValueError, match="qkv of layer 0 is int8 there, fast asks for fp8"):
        packed_checkpoint.packed_config(tmp_path / "packed", FastConfig(precision="fp8", attention="int8_qk"))
    description = tmp_path / "packed" / packed_checkpoint.PACKED_FILE
    description.write_text(description.read_text().replace('"precision": "int8"', '"precision": "int4"'))
    with pytest.raises(CheckpointError, match="precision must be one of bf16, int8, fp8; got 'int4'"):
        packed_checkpoint.packed_config(tmp_path / "packed", None)


def test_what_is_skipped_stays_in_bf16() -> None:
    case = golden.load_case("local_v1_fp32")
    model: Any = accelerated(case, skip=["down", "proj:0"])
    first, last = model.block.layers[0], model.block.layers[-1]
    assert first.down_weight.dtype == first.proj_weight.dtype == torch.bfloat16
    assert first.up_weight.dtype == last.proj_weight.dtype == torch.int8
    assert error(run(model, case), case) <= INT8_MODEL_BUDGET
    codes = {e.layer for e in explain(model) if e.op == "quantize_rows"}
    assert codes == set(range(1, case.config.num_layers)), "where neither proj nor down is in int8 it does not run"
    assert {e.precision for e in explain(model) if e.op == "quantize_rows"} == {"int8"}
    assert not [e for e in explain(accelerated(case, precision="fp8")) if e.op == "quantize_rows"]


def test_a_layer_is_nine_launches() -> None:
    for launches in launches_per_layer(FastConfig(precision="int8", attention="int8_qk")):
        assert len(launches) == 9, launches
        assert sum("quantize_rows" in name for name in launches) == 2


def test_formats_that_are_checked_are_those_that_run() -> None:
    assert checked_formats("qkv_linear", "int8", "bf16") == ("int8_x",)
    assert checked_formats("qkv_linear", "int8", "int8_qk") == ("int8_x_int8_qk",)
    assert checked_formats("qkv_linear", "int8", "fp8") == ("int8_x_fp8",)
    assert checked_formats("block_sparse_attention", "int8", "int8_qk") == ("int8_qk",)
    assert checked_formats("block_sparse_attention", "int8", "bf16") == ("bf16",)
    assert checked_formats("quantize_rows", "int8", None) == ("int8",)
    assert checked_formats("quantize_rows", "fp8", None) == ()
    assert set(checked_formats("fp8_linear", "int8", None, mixed=True)) == {"int8", "bf16"}


@pytest.mark.parametrize(
    ("seconds", "attention", "gib"), [(5, "bf16", 18.5), (5, "int8_qk", 18.5), (15, "int8_qk", 21.8)]
)
def test_a_1080p_clip_fits_a_card_of_24_gb(seconds: int, attention: Any, gib: float) -> None:
    fast = FastConfig(precision="int8", attention=attention)
    choices = choose("reference", "int8", torch.device("cpu"), attention=attention)

    def peak(how: FastConfig) -> float:
        clip = tokens_for("1080p", "16:9", seconds)
        return peak_by_kind(FULL, clip, lambda config: empty_accelerated(config, how, choices)) / 2**30

    assert peak(fast) <= gib
    if seconds == 5:
        assert peak(dataclasses.replace(fast, mlp_rows=None)) > gib, "what the chunks are for"


def test_costs_of_a_step() -> None:
    clip = tokens_for("1080p")
    int8, fp8 = (step_costs(FULL, clip, precision=p, attention="bf16") for p in ("int8", "fp8"))
    assert totals(int8)["flops"] == totals(fp8)["flops"]
    passes = [c for c in int8 if c.op == "quantize"]
    n = clip.total()
    for cost in passes:
        inner = FULL.intermediate_size(0 if "GELU7" in cost.kind else 10)
        assert cost.flops == 0 and cost.bytes >= 3 * n * (5120 + inner) * 0.99
    assert sum(c.count for c in passes) == FULL.num_layers and not [c for c in fp8 if c.op == "quantize"]
    assert step_costs(FULL, clip, precision="int8", gpu=GPUS["a100"]), "an A100 has int8 and no e4m3"
    with pytest.raises(ValueError, match="a100 has no fp8 tensor cores"):
        step_costs(FULL, clip, precision="fp8", gpu=GPUS["a100"])
