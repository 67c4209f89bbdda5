"""Accelerated models under torch.compile and torch.export: one graph, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from happyhorse_fast import golden
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig, Tiles, TopK
from happyhorse_fast.ops import fp8_linear_activation, rmsnorm_quantize

CASE = golden.load_case("postnorm_v2_fp32")
INPUTS = tuple(CASE.tensors[f"in.{name}"] for name in ("video", "audio", "text"))


@pytest.fixture(autouse=True)
def no_remembered_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def accelerated(precision: str = "bf16") -> torch.nn.Module:
    return accelerate(CASE.model(torch.bfloat16), FastConfig(precision=precision, backend="reference"))  # type: ignore[arg-type]


def same(result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("seen_before", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_graph(seen_before: bool) -> None:
    model = accelerated("fp8")
    with torch.no_grad():
        expected = accelerated("fp8")(*INPUTS)
        if seen_before:
            model(*INPUTS)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert same(compiled(*INPUTS), expected)
        assert same(compiled(*INPUTS), expected)


@pytest.mark.parametrize("sparsity", [pytest.param(Tiles(1, 1, 1), marks=pytest.mark.slow), TopK(0.5)])
def test_a_sparse_model_is_one_graph_and_exports(sparsity: Tiles | TopK) -> None:
    case, fast = golden.load_case("local_v1_fp32"), FastConfig(backend="reference", sparsity=sparsity)
    config = case.config.replace(num_layers=2, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=(0,))
    inputs = tuple(case.tensors[f"in.{name}"] for name in ("video", "audio", "text"))
    models = [accelerate(HappyHorse(config).init_weights(0), fast) for _ in range(3)]
    with torch.no_grad():
        expected = models[0](*inputs)
        assert same(torch.compile(models[1], fullgraph=True, backend="aot_eager")(*inputs), expected)
        assert same(torch.export.export(models[2], inputs).module()(*inputs), expected)


def test_one_graph_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch 2.11, which a GPU's machine may have, cannot trace it.
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: pytest.fail("asked for in a call"))
    model = accelerated()
    with torch.no_grad():
        expected = accelerated()(*INPUTS)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            assert same(compiled(*INPUTS), expected)


def test_exported() -> None:
    with torch.no_grad():
        program = torch.export.export(accelerated(), INPUTS)
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert sum("happyhorse_fast" in name for name in names) >= 5, names
        assert same(program.module()(*INPUTS), accelerated()(*INPUTS))


@pytest.mark.slow
@pytest.mark.parametrize("make", [accelerated, lambda: CASE.model(torch.bfloat16)], ids=["fast", "eager"])
@pytest.mark.parametrize("dynamic", [None, False])
def test_a_second_clip_shape_after_compiling(make: Callable[[], torch.nn.Module], dynamic: bool | None) -> None:
    compiled = torch.compile(make(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    shorter = (INPUTS[0][:, :, :2].contiguous(), INPUTS[1][:, :5].contiguous(), INPUTS[2])
    with torch.no_grad():
        compiled(*INPUTS)
        assert same(compiled(*shorter), make()(*shorter))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_ops_trace_on_a_gpu_that_is_not_there(backend: str) -> None:
    def mlp(hidden: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        x, _ = rmsnorm_quantize(hidden, norm, tiles, backend=backend)
        return fp8_linear_activation(x, None, weight, None, tiles, activation="swiglu7", fp8=False, backend=backend)[0]

    with FakeTensorMode():
        arguments = (
            torch.empty(256, 160, device="cuda"),
            torch.empty(1, 160, device="cuda"),
            torch.empty(1, 256, 160, device="cuda", dtype=torch.bfloat16),
            torch.empty(2, 3, device="cuda", dtype=torch.int32),
        )
        out = torch.compile(mlp, fullgraph=True, backend="eager")(*arguments)
    assert (out.shape, out.device.type, out.dtype) == ((256, 128), "cuda", torch.bfloat16)
