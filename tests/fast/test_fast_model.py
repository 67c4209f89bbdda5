"""Accelerated models: against recorded outputs, restored bit for bit, in the public implementation's place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from logged import logs
from small_models import PublicLayout

from happyhorse_fast import golden
from happyhorse_fast.block_map import BlockMap, BlockSelector, Layout
from happyhorse_fast.budgets import measure
from happyhorse_fast.eager.model import HappyHorse, Layer
from happyhorse_fast.fast import accelerate as acceleration
from happyhorse_fast.fast.accelerate import accelerate, explain, restore
from happyhorse_fast.fast.clip_state import SparsePolicy
from happyhorse_fast.fast.config import FastConfig, Tiles, TopK, TopP
from happyhorse_fast.fast.state import FastState, is_accelerated
from happyhorse_fast.fast.step import at_step
from happyhorse_fast.ops.runtime.cuda.launch import use_runner
from happyhorse_fast.ops.runtime.dispatch import Choice
from happyhorse_fast.ops.runtime.obstacles import BackendError

CASES = ["dense_v2_fp32", "local_d128_fp32", "local_v1_fp32", "postnorm_v2_fp32"]
# Measured on the golden cases with the reference backend: 8.5e-2 at most (random weights, hidden size 160 or 256).
FP8_MODEL_BUDGET = 0.12


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return measure(value, expected.double()).relative_l2


def run(model: torch.nn.Module, case: golden.GoldenCase) -> tuple[torch.Tensor, torch.Tensor]:
    t = case.tensors
    with torch.no_grad():
        video, audio = model(t["in.video"], t["in.audio"], t["in.text"])
    return video, audio


# The interpreter takes 40 s for six small layers; test_equivalence.py has a quick run of every op.
INTERPRETED = [pytest.param(name, "triton", marks=pytest.mark.slow) for name in CASES]


# CUDA kernels in the shim; the products that have none run as plain torch, which "cuda" says.
IN_SHIM = [(name, "cuda") for name in ("postnorm_v2_fp32", "local_d128_fp32")]


@pytest.mark.quick(3)
@pytest.mark.parametrize(("name", "backend"), [*((name, "reference") for name in CASES), *INTERPRETED, *IN_SHIM])
def test_bf16_within_twice_eagers_own_error(name: str, backend: str) -> None:
    case = golden.load_case(name)
    expected = case.tensors["out.video"], case.tensors["out.audio"]
    model = case.model(torch.bfloat16)
    eager = [relative_l2(v, e) for v, e in zip(run(model, case), expected, strict=True)]
    accelerate(model, FastConfig(backend=backend))
    fast = [relative_l2(v, e) for v, e in zip(run(model, case), expected, strict=True)]
    for mode, ours, theirs in zip(("video", "audio"), fast, eager, strict=True):
        assert ours <= 2 * theirs, f"{mode}: measured {ours:.2e}, eager bf16 {theirs:.2e}"


@pytest.mark.parametrize(
    ("name", "backend", "attention"),
    [
        ("local_v1_fp32", "reference", "fp8"),
        ("postnorm_v2_fp32", "reference", "bf16"),
        ("local_v1_fp32", "reference", "int8_qk_fp8_v"),
        ("postnorm_v2_fp32", "cuda", "bf16"),
        pytest.param("local_d128_fp32", "triton", "fp8", marks=pytest.mark.slow),
        pytest.param("dense_v2_fp32", "triton", "int8_qk", marks=pytest.mark.slow),
        pytest.param("local_d128_fp32", "triton", "int8_qk_fp8_v", marks=pytest.mark.slow),
    ],
)
def test_fp8_error_is_as_stated(name: str, backend: str, attention: Any) -> None:
    case = golden.load_case(name)
    model = accelerate(case.model(torch.bfloat16), FastConfig(precision="fp8", attention=attention, backend=backend))
    for mode, value in zip(("video", "audio"), run(model, case), strict=True):
        error = relative_l2(value, case.tensors[f"out.{mode}"])
        assert error <= FP8_MODEL_BUDGET, f"{mode}: measured {error:.2e}"
        assert error > 1e-2, "an fp8 model this close to float32 does not compute in fp8"


# A code of int8 is off by a step / sqrt(12), and a step is the largest of D values (of 128 D of k) / 127: at D = 128,
# of normally distributed ones, 2.8 / 127 / sqrt(12) = 0.63 % of q's and 4.4 / 127 / sqrt(12) = 1.0 % of k's RMS. They
# move a score, and so a weight of the sum, by 1.2 % of its spread; attention is one of two branches in the stream.
INT8_QK_ERROR = 0.012
IN_INT8 = [
    *((name, "reference") for name in CASES),
    *(pytest.param(name, "triton", marks=pytest.mark.slow) for name in ("postnorm_v2_fp32", "local_d128_fp32")),
]


@pytest.mark.parametrize(("name", "backend"), IN_INT8)
def test_int8_queries_and_keys_are_within_their_budget(name: str, backend: str) -> None:
    case = golden.load_case(name)
    expected = case.tensors["out.video"], case.tensors["out.audio"]
    model = case.model(torch.bfloat16)
    eager = [relative_l2(v, e) for v, e in zip(run(model, case), expected, strict=True)]
    bf16 = run(accelerate(model, FastConfig(backend="reference")), case)
    fast = FastConfig(attention="int8_qk", backend=backend)
    found = run(accelerate(case.model(torch.bfloat16), fast), case)
    for mode, value, truth, theirs, exact in zip(("video", "audio"), found, expected, eager, bf16, strict=True):
        budget = math.hypot(2 * theirs, INT8_QK_ERROR)
        assert relative_l2(value, truth) <= budget, f"{mode}: measured {relative_l2(value, truth):.2e}, {budget:.2e}"
        assert relative_l2(value, exact) > 1e-3, "a model this close to bf16 attends in bf16"


def test_mlp_in_chunks_gives_the_same_bits() -> None:
    case = golden.load_case("dense_v2_fp32")
    whole = run(accelerate(case.model(torch.bfloat16), FastConfig(backend="reference")), case)
    parts = run(accelerate(case.model(torch.bfloat16), FastConfig(backend="reference", mlp_rows=128)), case)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_restore_gives_back_every_bit() -> None:
    case = golden.load_case("local_v1_fp32")
    model = case.model(torch.bfloat16)
    before, weights = run(model, case), {k: v.clone() for k, v in model.state_dict().items()}
    accelerate(model, FastConfig(precision="fp8", backend="reference"))
    assert is_accelerated(model)
    assert isinstance(model, HappyHorse)
    assert not any(k.endswith("linear_qkv.weight") for k in model.state_dict())
    restore(model)
    assert not is_accelerated(model)
    assert type(model) is HappyHorse
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(run(model, case), before, strict=True))


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden.load_case("postnorm_v2_fp32")
    model = case.model(torch.bfloat16)
    before = run(model, case)
    as_it_is = FastState.pack

    def interrupted(state: FastState, index: int, *rest: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return as_it_is(state, index, *rest)

    monkeypatch.setattr(FastState, "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, FastConfig(backend="reference"))
    assert not is_accelerated(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model, case), before, strict=True))


def test_an_interruption_while_a_layer_moves_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden.load_case("postnorm_v2_fp32")
    model = case.model(torch.bfloat16)
    before, as_it_is = run(model, case), Layer.to
    moved: list[Layer] = []

    def interrupted(layer: Layer, *arguments: Any) -> Layer:
        moved.append(layer)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return as_it_is(layer, *arguments)

    monkeypatch.setattr(Layer, "to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, FastConfig(backend="reference"))
    assert moved[3:] == moved[:3], "every layer that was to leave comes back"
    assert not is_accelerated(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model, case), before, strict=True))


def test_inference_only() -> None:
    case = golden.load_case("postnorm_v2_fp32")
    model = accelerate(case.model(torch.bfloat16), FastConfig(backend="reference"))
    video, audio = model(*(case.tensors[f"in.{name}"] for name in ("video", "audio", "text")))
    assert not video.requires_grad
    assert not audio.requires_grad


def test_misuse_is_named() -> None:
    model = golden.load_case("postnorm_v2_fp32").model(torch.bfloat16)
    with pytest.raises(ValueError, match="not accelerated"):
        restore(model)
    with pytest.raises(TypeError, match="fast must be a FastConfig, got dict"):
        accelerate(model, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a HappyHorse"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a module that accelerate, .* got None"):
        restore(None)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="model must hold data to be packed, it is on the meta device"):
        accelerate(HappyHorse(model.config, device="meta"))
    with use_runner(None), pytest.raises(BackendError, match="backend 'cuda' cannot run: CUDA kernels need a GPU"):
        accelerate(model, FastConfig(backend="cuda"))
    accelerate(model, FastConfig(backend="reference", originals="drop"))
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    with pytest.raises(ValueError, match="were dropped"):
        restore(model)


def test_auto_on_a_cpu_says_once_why() -> None:
    model = golden.load_case("postnorm_v2_fp32").model(torch.bfloat16)
    lines: list[str] = []
    accelerate(model, FastConfig(), report=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("every op runs in plain torch (backend reference): ")
    assert {e.backend for e in explain(model)} == {"reference"}
    restore(model)
    with pytest.raises(BackendError, match="strict"):
        accelerate(model, FastConfig(strict=True))
    assert not is_accelerated(model)


def test_explain_names_what_runs() -> None:
    case = golden.load_case("local_v1_fp32")
    eager = {(e.layer, e.op): (e.backend, e.precision, e.mask) for e in explain(case.model(torch.bfloat16))}
    assert eager[0, "attention"] == ("eager", "bfloat16", "window")
    assert eager[1, "attention"] == ("eager", "bfloat16", "dense")
    assert len(eager) == 5 * case.config.num_layers
    with pytest.raises(TypeError, match="model must be a HappyHorse"):
        explain(torch.nn.Linear(2, 2))
    fast = FastConfig(
        precision="fp8",
        attention="fp8",
        skip=["attention:2"],
        sparsity=TopK(0.5),
        exact_first_layers=3,
        backend="reference",
    )
    lines = {(e.layer, e.op): e for e in explain(accelerate(case.model(torch.bfloat16), fast))}
    assert lines[0, "block_sparse_attention"].mask == "window"
    assert lines[1, "block_sparse_attention"].mask == "dense"
    assert lines[4, "block_sparse_attention"].mask == "TopK(keep=0.5)"
    assert lines[2, "block_sparse_attention"].precision == "bf16"
    assert lines[1, "block_sparse_attention"].precision == "fp8"
    assert (0, "fp8_linear") not in lines


@pytest.mark.parametrize("sparsity", [TopK(1.0), TopP(1.0), Tiles(99, 99, 99)])
def test_a_policy_that_keeps_everything_is_exact(sparsity: Any) -> None:
    case = golden.load_case("local_v1_fp32")
    exact = run(accelerate(case.model(torch.bfloat16), FastConfig(backend="reference")), case)
    kept = run(accelerate(case.model(torch.bfloat16), FastConfig(backend="reference", sparsity=sparsity)), case)
    for a, b in zip(exact, kept, strict=True):
        assert relative_l2(b, a) < 4e-3


@pytest.mark.parametrize("name", ["local_v1_fp32", "local_d128_fp32"])
def test_drop_in_for_the_public_implementation(name: str) -> None:
    case = golden.load_case(name)
    t, config = case.tensors, case.config
    model = accelerate(PublicLayout(case.model(torch.bfloat16)), FastConfig(backend="reference"))
    handler = SimpleNamespace(q_ranges=t["local.q_ranges"], k_ranges=t["local.k_ranges"])
    with torch.no_grad():
        out = model(t["tokens"], t["coords"], t["modality"], None, handler)
    assert out.shape == (len(t["tokens"]), config.video_in_channels)
    ours = accelerate(case.model(torch.bfloat16), FastConfig(backend="reference"))
    video, audio = run(ours, case)
    frames, rows, columns = (int(x) for x in t["coords"][0, 3:6])
    tokens = out[t["modality"] == 0].reshape(frames, rows, columns, 2, 2, -1).permute(5, 0, 1, 3, 2, 4)
    assert relative_l2(tokens.reshape(video.shape), video) < 1e-6
    assert relative_l2(out[t["modality"] == 1, : config.audio_in_channels], audio[0]) < 1e-6
    assert not out[t["modality"] == 2].any()
    with pytest.raises(ValueError, match="local_attn_handler must not be None"):
        model(t["tokens"], t["coords"], t["modality"], None, None)
    other = t["coords"].clone()
    other[:, 6] += 1  # another reference grid: a remembered rotation would be stale
    with torch.no_grad():
        assert not torch.equal(model(t["tokens"], other, t["modality"], None, handler), out)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "fast",
    [
        FastConfig(backend="reference"),
        FastConfig(precision="fp8", attention="fp8", backend="reference"),
        FastConfig(attention="int8_qk", backend="reference"),
    ],
)
def test_autocast_changes_no_bit(fast: FastConfig) -> None:
    case = golden.load_case("local_v1_fp32")
    t = case.tensors
    handler = SimpleNamespace(q_ranges=t["local.q_ranges"], k_ranges=t["local.k_ranges"])
    results = []
    for enabled in (False, True):
        ours = accelerate(case.model(torch.bfloat16), fast)
        public = accelerate(PublicLayout(case.model(torch.bfloat16)), fast)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = public(t["tokens"], t["coords"], t["modality"], None, handler)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append([*run(ours, case), out])
    for plain, under in zip(*results, strict=True):
        assert under.dtype == torch.float32 and torch.equal(plain, under)


@pytest.fixture
def other_default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("sparsity", [TopP(0.5), pytest.param(None, marks=pytest.mark.slow)])
def test_a_default_dtype_changes_no_bit(sparsity: Any, request: pytest.FixtureRequest) -> None:
    case, fast = golden.load_case("local_v1_fp32"), FastConfig(backend="reference", sparsity=sparsity)
    t = case.tensors
    handler = SimpleNamespace(q_ranges=t["local.q_ranges"], k_ranges=t["local.k_ranges"])
    eager = [case.model(torch.bfloat16) for _ in range(4)]

    def results(first: HappyHorse, second: HappyHorse) -> list[torch.Tensor]:
        public = accelerate(PublicLayout(second), fast)
        with torch.no_grad():
            out = public(t["tokens"], t["coords"], t["modality"], None, handler)
        return [*run(accelerate(first, fast), case), out]

    expected = results(*eager[:2])
    request.getfixturevalue("other_default_dtype")
    for plain, under in zip(expected, results(*eager[2:]), strict=True):
        assert under.dtype == torch.float32 and torch.equal(plain, under)


@pytest.mark.usefixtures("other_default_dtype")
def test_a_default_dtype_leaves_packed_weights_and_selectors_alone() -> None:
    case = golden.load_case("local_d128_fp32")
    layer = accelerate(case.model(torch.bfloat16), FastConfig(precision="fp8", backend="reference")).block.layers[0]
    assert {b.dtype for b in layer.buffers()} == {torch.float8_e4m3fn, torch.float32}
    assert BlockSelector(Layout(2, 100, 3, 4), BlockMap.dense(207, 207), "cpu").inverse.dtype == torch.float32


def several_blocks(fast: FastConfig) -> Any:
    """A model of two layers on four frames of 128 tokens: maps that can leave something out."""
    config = golden.load_case("postnorm_v2_fp32").config.replace(
        num_layers=2, mm_layers=(0,), gelu7_layers=(0,), post_norm_layers=(), local_attn_layers=()
    )
    model = HappyHorse(config)
    model.load_state_dict(golden.recipe_weights(config, 3))
    inputs = [
        golden.draw(3, name, shape)
        for name, shape in (("v", (1, 48, 4, 16, 32)), ("a", (1, 13, 64)), ("t", (1, 6, config.text_in_channels)))
    ]
    return accelerate(model, fast), inputs


@pytest.mark.parametrize("sparsity", [TopK(0.25), TopP(0.3), Tiles(0, 9, 9)])
def test_a_policys_first_step_makes_nothing(sparsity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = several_blocks(FastConfig(backend="reference", sparsity=sparsity, exact_first_steps=1))
    with torch.no_grad(), at_step(0, 8):
        model(*inputs)

    def made(*_: Any) -> None:
        raise AssertionError("a CUDA graph of a sparse step would wait for the device here")

    monkeypatch.setattr(SparsePolicy, "__init__", made)
    with torch.no_grad(), at_step(1, 8):
        model(*inputs)


def test_plain_attention_on_a_gpu_is_announced_before_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, **__: Any) -> dict[str, Choice]:
        op = "block_sparse_attention"
        return {op: Choice(op, "reference", "triton is wrong", fell_back=True)}

    monkeypatch.setattr(acceleration, "choose", slow)
    with logs("triton is wrong; attention in plain torch is for short clips: half an hour"):
        acceleration.choose_ops(FastConfig(), torch.device("cuda"), None)


@pytest.mark.quick(3)
@pytest.mark.parametrize("sparsity", [TopK(0.25), TopP(0.3), Tiles(0, 9, 9)])
@pytest.mark.parametrize("attention", ["bf16", "int8_qk", "int8_qk_fp8_v"])
def test_a_policy_applies_where_and_when_it_may(sparsity: Any, attention: Any) -> None:
    exact, inputs = several_blocks(FastConfig(attention=attention, backend="reference"))
    fast = FastConfig(
        attention=attention, backend="reference", sparsity=sparsity, exact_first_steps=1, exact_last_steps=1
    )
    sparse, _ = several_blocks(fast)
    with torch.no_grad():
        expected = exact(*inputs)[0]
        errors = []
        for step in (0, 1, 7):
            with at_step(step, 8):
                errors.append(relative_l2(sparse(*inputs)[0], expected))
    assert errors[0] == errors[2] == 0
    assert 1e-3 < errors[1] < 1
