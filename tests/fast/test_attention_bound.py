"""Bounds of a layer's scores and values: found from its packed weights, and said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from happyhorse_fast import golden
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.load import load
from happyhorse_fast.checkpoint.packed import save_packed
from happyhorse_fast.fast import accelerate as acceleration
from happyhorse_fast.fast import layer as fast_layer
from happyhorse_fast.fast.accelerate import accelerate, empty_accelerated, explain
from happyhorse_fast.fast.attention import UNKNOWN, AttentionBound
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.kernels.launch import config_for
from happyhorse_fast.ops.attention.score_bound import LIMIT, norm_bound
from happyhorse_fast.ops.runtime.dispatch import choose

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case() -> golden.GoldenCase:
    return golden.load_case("local_d128_fp32")


def run(model: torch.nn.Module, case: golden.GoldenCase) -> None:
    with torch.no_grad():
        model(*(case.tensors[f"in.{name}"] for name in ("video", "audio", "text")))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_no_score_and_no_value_of_a_run_passes_its_bound(
    precision: Any, case: golden.GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = accelerate(case.model(torch.bfloat16), FastConfig(precision=precision, backend="reference"))
    as_it_is, seen = fast_layer.block_sparse_attention, []

    def watched(q: Any, k: Any, v: Any, block_map: Any, **options: Any) -> Any:
        queries, keys = q.float(), k.float()
        if q.dtype == torch.int8:
            queries *= options["q_scale"][:, :, None]
            keys *= options["k_scale"].T.repeat_interleave(128, dim=0)[: len(k), :, None]
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("ihd,jhd->hij", queries, keys).abs().max() * options["scale"] * math.log2(math.e)
        seen.append((float(scores), float(v.float().abs().max()), options["bound"]))
        return as_it_is(q, k, v, block_map, **options)

    monkeypatch.setattr(fast_layer, "block_sparse_attention", watched)
    run(model, case)
    for layer, (scores, v_max, passed_on) in zip(model.block.layers, seen, strict=True):
        assert passed_on == layer.bound.effective
        assert scores <= layer.bound.scores <= 20 * scores
        assert v_max <= layer.bound.v_max <= 20 * v_max


def test_it_is_what_the_published_weights_give(case: golden.GoldenCase) -> None:
    eager = case.model(torch.bfloat16)
    attention = eager.block.layers[0].attention
    wanted = norm_bound(*(x.weight.detach().unflatten(0, (-1, 128)) for x in (attention.q_norm, attention.k_norm)))
    assert accelerate(eager, FastConfig(backend="reference")).block.layers[0].bound.effective == pytest.approx(wanted)


def test_nan_in_the_weights_of_one_expert_is_no_bound(case: golden.GoldenCase) -> None:
    model: Any = accelerate(case.model(torch.bfloat16), FastConfig(backend="reference"))
    layer = next(layer for layer in model.block.layers if layer.plan.experts == 3)
    v_row = (case.config.num_heads_q + 2 * case.config.num_heads_kv) * case.config.head_dim - 1
    assert layer.bound.effective < LIMIT
    layer.weight_of("qkv")[1, v_row, 3] = math.nan
    layer.find_bound()
    assert layer.bound.effective == math.inf


def test_a_forward_pass_does_not_look_for_it(case: golden.GoldenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(case.model(torch.bfloat16), FastConfig(backend="reference"))
    monkeypatch.setattr(fast_layer, "value_bound", None)
    run(model, case)


def test_without_weights_nothing_is_known(case: golden.GoldenCase) -> None:
    model: Any = empty_accelerated(case.config, FastConfig(backend="reference"), choose("reference", "bf16", CPU))
    assert {layer.bound for layer in model.block.layers} == {UNKNOWN}
    assert {layer.bound.effective for layer in model.block.layers} == {math.inf}


SAID = {
    AttentionBound(34.06, 20.0): "bounded softmax: scores at most 34.1 of 100 powers of two",
    AttentionBound(99.0, 512.0): "bounded softmax: scores at most 100.0 of 100 powers of two",
    AttentionBound(120.0, 20.0): "running maximum: 120.0 > 100 powers of two; scores reach 120.0 by the weights of q's "
    "and k's norms",
    AttentionBound(99.0, 1024.0): "running maximum: 101.0 > 100 powers of two; v adds 2.0, since it may reach 1.02e+03",
    AttentionBound(105.0, 512.0): "running maximum: 106.0 > 100 powers of two; scores reach 105.0 by the weights of "
    "q's and k's norms and v adds 1.0, since it may reach 512",
    UNKNOWN: "running maximum: its weights are not known, or not finite",
    AttentionBound(math.nan, 1.0): "running maximum: its weights are not known, or not finite",
}


@pytest.mark.parametrize("bound", SAID)
def test_which_softmax_and_what_is_to_blame(bound: AttentionBound) -> None:
    assert bound.softmax == SAID[bound]
    assert (bound.effective <= LIMIT) == bound.softmax.startswith("bounded")


def lines(model: torch.nn.Module) -> list[str]:
    return [e.reason for e in explain(model) if e.op == "block_sparse_attention"]


def test_explain_says_it_per_layer(case: golden.GoldenCase) -> None:
    fast = FastConfig(attention="fp8", skip=["attention:0"], backend="reference")
    model: Any = accelerate(case.model(torch.bfloat16), fast)
    bound = model.block.layers[0].bound.effective
    assert lines(model)[0] == f"asked for; bounded softmax: scores at most {bound:.1f} of 100 powers of two"
    assert set(lines(model)[1:]) == {"asked for; running maximum, which P in e4m3 needs"}


@pytest.mark.parametrize("arch", [80, 90])
def test_explain_says_what_runs_on_hopper_past_the_limit(
    arch: int, case: golden.GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = accelerate(case.model(torch.bfloat16), FastConfig(backend="triton"))
    layer = model.block.layers[0]
    hopper = config_for("attention", "bf16_d128", arch).hopper
    assert hopper == (arch == 90)
    monkeypatch.setattr(acceleration, "is_hopper", lambda *_, **__: hopper)
    for bound, runs in ((AttentionBound(30.0, 1.0), "in the Hopper kernel"), (AttentionBound(130.0, 1.0), "in plain")):
        layer.bound = bound
        assert (runs in lines(model)[0]) == hopper


def description(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "happyhorse_fast.json").read_text())
    return content


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_packed_weights_give_it(precision: Any, case: golden.GoldenCase, tmp_path: Path) -> None:
    fast = FastConfig(precision=precision, backend="reference")
    model: Any = accelerate(case.model(torch.bfloat16), fast)
    save_packed(model, tmp_path / "packed")
    again: Any = load(tmp_path / "packed", fast=fast, progress=False)
    assert [layer.bound for layer in again.block.layers] == [layer.bound for layer in model.block.layers]
    assert all(layer.bound.effective < LIMIT for layer in again.block.layers)


def test_weights_packed_for_fp8_qk_say_what_is_in_its_place(case: golden.GoldenCase, tmp_path: Path) -> None:
    save_packed(accelerate(case.model(torch.bfloat16), FastConfig(backend="reference")), tmp_path / "packed")
    file, content = tmp_path / "packed" / "happyhorse_fast.json", description(tmp_path / "packed")
    file.write_text(json.dumps(content | {"fast": content["fast"] | {"attention": "fp8_qk"}}))
    with pytest.raises(CheckpointError, match="got 'fp8_qk'; int8_qk is in its place"):
        load(tmp_path / "packed", progress=False)
    file.write_text(json.dumps(content | {"fast": content["fast"] | {"attention": "int8_qk", "backend": "reference"}}))
    assert load(tmp_path / "packed", progress=False).fast.fast.attention == "int8_qk"  # type: ignore[union-attr]
