"""What an acceleration may be asked for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from happyhorse_fast.checkpoint.load import load
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig, Tiles, TopK, TopP, is_exact_step

TINY = ModelConfig.preset("tiny")


def test_precision_per_op_and_layer() -> None:
    fast = FastConfig(precision="fp8", attention="int8_qk", skip=["down:0-3,36-39", "qkv", "*:5"])
    assert fast.precision_of("down", 2) == "bf16" == fast.precision_of("down", 39)
    assert fast.precision_of("down", 4) == "fp8"
    assert {fast.precision_of("qkv", i) for i in range(40)} == {"bf16"}
    assert fast.precision_of("attention", 4) == "int8_qk"
    assert {fast.precision_of(op, 5) for op in ("qkv", "attention", "proj", "up", "down")} == {"bf16"}
    assert FastConfig(precision="fp8").precision_of("attention", 0) == "int8_qk"


@pytest.mark.parametrize("attention", ["bf16", "int8_qk", "fp8"])
def test_attention_does_not_go_by_the_products(attention: Any) -> None:
    for precision in ("bf16", "fp8"):
        fast = FastConfig(precision=precision, attention=attention)  # type: ignore[arg-type]
        assert [fast.precision_of(op, 0) for op in ("qkv", "attention", "down")] == [precision, attention, precision]
    if attention != "bf16":
        fast = FastConfig(attention=attention, skip=["attention:1", "*:2"])
        assert [fast.precision_of("attention", layer) for layer in range(4)] == [attention, "bf16", "bf16", attention]


def test_where_sparsity_applies() -> None:
    fast = FastConfig(sparsity=TopK(0.25), exact_first_layers=2, exact_last_layers=1, exact_first_steps=1)
    assert [layer for layer in range(6) if fast.is_sparse(layer, 6)] == [2, 3, 4]
    assert [step for step in range(8) if not is_exact_step(step, 8, 2, 1)] == [2, 3, 4, 5, 6]
    assert not FastConfig().is_sparse(3, 6)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"precision": "int4"}, ValueError, "precision must be one of bf16, int8, fp8; got 'int4'"),
        ({"backend": "cpu"}, ValueError, "backend must be one of"),
        ({"skip": "down"}, TypeError, "skip must be a list"),
        ({"skip": ["downs"]}, ValueError, "got 'downs'"),
        ({"skip": ["down:a"]}, ValueError, "got 'down:a'"),
        ({"sparsity": 0.25}, TypeError, "sparsity must be None, TopK, TopP or Tiles; got 0.25"),
        ({"skip": [3]}, TypeError, r"skip must be a list such as .*, got \[3\]"),
        ({"precision": "fp8", "skip": ["down:3-1"]}, ValueError, "first layer before its last, got 'down:3-1'"),
        ({"skip": ["down"]}, ValueError, "skip must name products that are not in bf16 anyway, got 'down'"),
        ({"attention": "fp8", "skip": ["*:0", "up"]}, ValueError, "not in bf16 anyway, got 'up'"),
        (
            {"attention": "fp8_qk"},
            ValueError,
            "one of bf16, int8_qk, int8_qk_fp8_v, fp8; got 'fp8_qk'; int8_qk is in its place",
        ),
        ({"attention": "int8"}, ValueError, "attention must be one of bf16, int8_qk, int8_qk_fp8_v, fp8; got 'int8'$"),
        ({"strict": "no"}, TypeError, "strict must be True or False, got 'no'"),
        ({"mlp_rows": "a"}, ValueError, "multiple of 128, got 'a'"),
        ({"mlp_rows": 100}, ValueError, "multiple of 128, got 100"),
        ({"exact_first_steps": -1}, ValueError, "exact_first_steps must be at least 0, got -1"),
    ],
)
def test_refused(fields: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        FastConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: TopK(0), lambda: TopK(1.5), lambda: TopP(0), lambda: Tiles(1, -1, 1)])
def test_refused_policies(make: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("fast", "config", "says"),
    [
        (FastConfig(precision="fp8", skip=["down", "up:0-3,6"]), TINY, "layers from 0 to 5, got 'up:0-3,6'"),
        (FastConfig(), TINY.replace(head_dim=96), r"head_dim must be one of \(32, 64, 128\) .*, got 96"),
    ],
)
def test_a_model_that_cannot_be_accelerated_so_is_refused(fast: FastConfig, config: ModelConfig, says: str) -> None:
    FastConfig(precision="fp8", skip=["up:0-3,5"]).require_model(TINY)
    with pytest.raises(ValueError, match=says):
        accelerate(HappyHorse(config, device="meta"), fast)
    with pytest.raises(ValueError, match=says):
        load("nowhere", config=config, fast=fast)
