"""Results are the same bits whatever the caller has set in torch, and the caller's settings are left as they were."""

from __future__ import annotations

import contextlib
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import happyhorse_fast as hh
from happyhorse_fast import ambient, golden
from happyhorse_fast.block_map import BlockMap, Layout
from happyhorse_fast.fast.config import FastConfig, TopK, TopP
from happyhorse_fast.fast.launches import launches_per_layer
from happyhorse_fast.fast.memory import peak_by_kind
from happyhorse_fast.ops.runtime import self_check
from happyhorse_fast.pony import encode_image, load_model
from happyhorse_fast.pony.generate import noise_and_text
from happyhorse_fast.pony.metrics import ssim
from happyhorse_fast.pony.weights import load_codecs
from happyhorse_fast.verify.checks import verify_case
from happyhorse_fast.verify.forms import FORMS

CASE = golden.load_case("local_v1_fp32")
CPU = torch.device("cpu")


@contextlib.contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def precision(backend: str, kind: str, value: str) -> Any:
    torch_c: Any = torch._C
    put = lambda x: torch_c._set_fp32_precision_setter(backend, kind, x)  # noqa: E731
    return setting(lambda: "none", put, value)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def print_options() -> Iterator[None]:
    torch.set_printoptions(precision=1, sci_mode=True)
    try:
        yield
    finally:
        torch.set_printoptions("default")


def torch_setting(name: str, value: Any, get: Callable[[], Any]) -> Any:
    return setting(get, getattr(torch, name), value)


torch_C: Any = torch._C
SETTINGS: dict[str, Callable[[], Any]] = {
    "matmul medium": lambda: torch_setting("set_float32_matmul_precision", "medium", lambda: "highest"),
    "matmul high": lambda: torch_setting("set_float32_matmul_precision", "high", lambda: "highest"),
    "generic bf16": lambda: precision("generic", "all", "bf16"),
    "mkldnn bf16": lambda: precision("mkldnn", "all", "bf16"),
    "mkldnn matmul bf16": lambda: precision("mkldnn", "matmul", "bf16"),
    "mkldnn conv bf16": lambda: precision("mkldnn", "conv", "bf16"),
    "cuda tf32": lambda: precision("cuda", "matmul", "tf32"),
    "no mkldnn": lambda: setting(torch_C._get_mkldnn_enabled, torch_C._set_mkldnn_enabled, False),
    "device meta": lambda: torch.device("meta"),
    "default device meta": lambda: torch_setting("set_default_device", "meta", lambda: None),
    "dtype float64": lambda: torch_setting("set_default_dtype", torch.float64, torch.get_default_dtype),
    "dtype bfloat16": lambda: torch_setting("set_default_dtype", torch.bfloat16, torch.get_default_dtype),
    "dtype float16": lambda: torch_setting("set_default_dtype", torch.float16, torch.get_default_dtype),
    "tensor type": lambda: torch_setting("set_default_tensor_type", torch.DoubleTensor, lambda: torch.FloatTensor),
    "autocast cpu": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast cuda": lambda: torch.autocast("cuda", torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": deterministic,
    "anomaly": torch.autograd.detect_anomaly,
    "flush_denormal": lambda: torch_setting("set_flush_denormal", True, lambda: False),
    "math sdp": lambda: sdpa_kernel(SDPBackend.MATH),
    "no flash": lambda: setting(torch_C._get_flash_sdp_enabled, torch_C._set_sdp_use_flash, False),
    "seed": lambda: contextlib.nullcontext(torch.manual_seed(7)),
    "warnings": strict_warnings,
    "numpy errors": lambda: np.errstate(all="raise"),
    "print options": print_options,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    hh.save_checkpoint(CASE.state_dict(), path / "published")
    hh.save_packed(
        hh.accelerate(CASE.model(torch.bfloat16), FastConfig(precision="fp8", backend="reference")), path / "packed"
    )
    return path


INPUTS = tuple(CASE.tensors[f"in.{name}"] for name in ("video", "audio", "text"))


def _eager() -> Iterator[torch.Tensor]:
    for dtype in (torch.float32, torch.bfloat16):
        yield from CASE.model(dtype)(*INPUTS)


def _loaded(folder: Path) -> Iterator[torch.Tensor]:
    fast = FastConfig(precision="fp8", backend="reference")
    for model in (
        hh.load(folder / "published", config=CASE.config, progress=False),
        hh.load(folder / "published", config=CASE.config, fast=fast, progress=False),
        hh.load(folder / "packed", fast=fast, progress=False),
    ):
        yield from model.state_dict().values()
        yield from model(*INPUTS)


def _accelerated() -> Iterator[torch.Tensor]:
    for fast in (
        FastConfig(backend="reference"),
        FastConfig(precision="fp8", backend="reference"),
        FastConfig(precision="fp8", attention="fp8", backend="reference", sparsity=TopK(0.5)),
        FastConfig(backend="reference", sparsity=TopP(0.5)),
    ):
        model = hh.accelerate(CASE.model(torch.bfloat16), fast)
        yield from model(*INPUTS)
        yield from model(*INPUTS)
        yield from hh.restore(model)(*INPUTS)


def _sampled() -> Iterator[torch.Tensor]:
    model = hh.accelerate(CASE.model(torch.bfloat16), FastConfig(backend="reference"))
    video, audio = hh.sample(model, *INPUTS, steps=2, noise=CASE.draw, progress=False)
    yield from (video, audio)
    yield from hh.sample(model, *INPUTS, steps=3, guidance=5.0, null_text=INPUTS[2][:, :2], progress=False)
    size = (video.shape[3] + 2, video.shape[4] + 2)
    eager = CASE.model(torch.float32)
    yield hh.super_resolve(eager, video, audio, INPUTS[2], size, steps=3, noise=CASE.draw, progress=False)


def _checked() -> Iterator[torch.Tensor]:
    (check,) = self_check.run_checks("triton", CPU, fp8=False, only={("fp8_linear", "bf16")})
    assert check.passed, check
    yield torch.tensor([*check.detail.encode()], dtype=torch.uint8, device="cpu")


def _mapped() -> Iterator[torch.Tensor]:
    layout = Layout(4, 250, 40, 60, align_frames=True, align_modalities=True)
    window = BlockMap.frame_window(layout, 1)
    draw = torch.Generator().manual_seed(3)
    q, k = (torch.randn(layout.slots, n, 32, generator=draw, dtype=torch.float32, device="cpu") for n in (2, 1))
    for made in (
        window,
        BlockMap.tile_window(layout, 25, (1, 5, 5), (1, 1, 1), window),
        BlockMap.top_k(q, k, layout, 3),
        BlockMap.top_p(q, k, layout, 0.6),
        BlockMap.from_flex(window.to_flex()),
    ):
        yield from made.tensors()


def _pony() -> Iterator[torch.Tensor]:
    yield from load_model().state_dict().values()
    for codec in load_codecs():
        yield from (codec.mean, codec.encoder, codec.decoder)
    yield from noise_and_text("a large red ball bounces twice", torch.Generator().manual_seed(1))
    pictures = golden.draw(1, "picture", (2, 128, 128, 3)).sigmoid()
    yield encode_image(pictures[0])
    yield ssim(pictures[:1], pictures[1:])


def _planned() -> Iterator[torch.Tensor]:
    clip, config = hh.tokens_for("256p", seconds=3), hh.ModelConfig.preset("tiny")
    peaks = [peak_by_kind(config, clip, form.without_weights) for form in FORMS]
    errors = [measurement.error for measurement in verify_case(CASE).measurements]
    yield torch.tensor([*peaks, len(launches_per_layer(FastConfig())), *errors], dtype=torch.float64, device="cpu")


PARTS: dict[str, Callable[[Path], Iterator[torch.Tensor]]] = {
    "eager": lambda _: _eager(),
    "load": _loaded,
    "accelerate": lambda _: _accelerated(),
    "sample": lambda _: _sampled(),
    "self-check": lambda _: _checked(),
    "plan and verify": lambda _: _planned(),
    "block maps": lambda _: _mapped(),
    "pony": lambda _: _pony(),
}


def results(part: str, folder: Path) -> list[torch.Tensor]:
    load_codecs.cache_clear()
    return [x.detach() for x in PARTS[part](folder)]


Unset = Callable[[str], list[torch.Tensor]]


@pytest.fixture(scope="module")
def unset(folder: Path) -> Unset:
    """Results of a part without a setting, computed when they are first asked for: the self-check takes seconds."""
    return cache(lambda part: results(part, folder))


def state() -> list[Any]:
    seen = [setting.get() for setting in ambient.SETTINGS]
    return [*seen, torch.get_rng_state().tolist(), random.getstate()]


# The interpreter takes seconds, so only what a verdict could hang on.
CHECKED_UNDER = ("matmul medium", "device meta", "dtype float64", "autocast cpu", "inference_mode", "deterministic")
# One setting of a kind in every run of the tests, the others with the slow ones: all take 100 s.
QUICK = ("matmul medium", "device meta", "dtype bfloat16", "autocast cpu")
CASES = [
    pytest.param(name, part, marks=[] if name in QUICK and part != "self-check" else pytest.mark.slow)
    for name in SETTINGS
    for part in PARTS
    if part != "self-check" or name in CHECKED_UNDER
]


def first_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    for i, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        if (value.dtype, value.device, value.shape) != (wanted.dtype, wanted.device, wanted.shape):
            return f"{i}: {value.dtype} {value.device} {list(value.shape)}"
        if not torch.equal(*(x.contiguous().view(torch.uint8) for x in (value, wanted))):
            return f"{i}: {float((value.double() - wanted.double()).norm() / wanted.double().norm())}"
    return None


@pytest.mark.quick(8)
@pytest.mark.parametrize(("name", "part"), CASES)
def test_no_setting_reaches_a_result(name: str, part: str, folder: Path, unset: Unset) -> None:
    expected = unset(part)
    with SETTINGS[name]():
        before = state()
        found = results(part, folder)
        assert state() == before, "a setting or a random generator is not what it was"
    assert first_difference(found, expected) is None


@pytest.mark.parametrize("name", ["matmul medium", "mkldnn matmul bf16", "device meta", "autocast cpu"])
def test_a_setting_that_is_not_held_is_seen(
    name: str, folder: Path, unset: Unset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = unset("eager")
    monkeypatch.setattr(ambient, "held", contextlib.nullcontext)
    with SETTINGS[name]():
        try:
            found = results("eager", folder)
        except (RuntimeError, ValueError):  # tensors on two devices
            return
    assert first_difference(found, expected) is not None


@pytest.mark.parametrize("mixed", [False, True])
def test_convolutions_on_a_gpu_are_exact_and_the_same_in_every_run(mixed: bool) -> None:
    put = lambda value: torch_C._set_fp32_precision_setter("cuda", "rnn", value)  # noqa: E731
    apart = setting(lambda: "tf32", put, "ieee") if mixed else contextlib.nullcontext()
    with apart, setting(torch_C._get_cudnn_benchmark, torch_C._set_cudnn_benchmark, True):
        before = state()
        with ambient.held():
            assert torch_C._get_fp32_precision_getter("cuda", "conv") in ("none", "ieee")
            assert torch_C._get_cudnn_deterministic() and not torch_C._get_cudnn_benchmark()
            assert mixed or torch.backends.cudnn.allow_tf32 is False, "whoever reads the old name meanwhile would fail"
        assert state() == before


@pytest.mark.slow
def test_threads_change_the_order_of_sums_and_no_more(folder: Path, unset: Unset) -> None:
    single = unset("eager")
    with torch_setting("set_num_threads", 2, torch.get_num_threads):
        for found, expected in zip(CASE.model(torch.float32)(*INPUTS), single, strict=False):
            assert float((found - expected).norm() / expected.norm()) < 1e-5
        assert len(results("self-check", folder)) == 1


def test_a_new_model_draws_nothing_and_starts_at_zero() -> None:
    before = torch.get_rng_state()
    model = hh.HappyHorse(CASE.config)
    assert torch.get_rng_state().equal(before)
    assert not any(parameter.any() for parameter in model.parameters())


def test_what_inference_mode_made_can_be_trained() -> None:
    with torch.inference_mode():
        model = hh.restore(hh.accelerate(CASE.model(torch.float32), FastConfig(backend="reference")))
    sum(x.sum() for x in model(*INPUTS)).backward()  # type: ignore[union-attr]
    weight = model.adapter.video_embedder.weight
    assert weight.grad is not None and weight.grad.any()


# Graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("eager", "fast")), "exported"])
def test_a_graph_is_exact_in_float32_too(compute: str) -> None:
    torch._dynamo.reset()
    model = CASE.model(torch.float32)
    if compute != "eager":
        hh.accelerate(model, FastConfig(backend="reference"))
    with torch.no_grad():
        expected = model(*INPUTS)
        with SETTINGS["matmul medium"]():
            if compute == "exported":
                graph: Any = torch.export.export(model, INPUTS).module()
            else:
                graph = torch.compile(model, fullgraph=True, backend="aot_eager")
            found = graph(*INPUTS)
    torch._dynamo.reset()
    assert first_difference(list(found), list(expected)) is None


@pytest.mark.slow
def test_gradients_pass_through_the_products_of_a_graph() -> None:
    torch._dynamo.reset()

    def gradients(call: Callable[..., Any]) -> list[torch.Tensor]:
        model.zero_grad()
        sum((x * x).sum() for x in call(*INPUTS)).backward()  # type: ignore[union-attr]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model = CASE.model(torch.float32)
    expected = gradients(model)
    found = gradients(torch.compile(model, backend="aot_eager"))
    torch._dynamo.reset()
    assert len(found) == len(expected) > 10
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


# Threads --------------------------------------------------------------------------------------------------------------


def test_threads_do_not_take_the_settings_from_each_other() -> None:
    x, y = (golden.draw(s, "x", (64, 64)) for s in (1, 2))
    expected = x @ y
    wrong: list[str] = []

    @ambient.independent
    def product() -> torch.Tensor:
        return x @ y

    def work() -> None:
        for _ in range(300):
            if not torch.equal(product(), expected):
                wrong.append("a product in less than float32")

    with SETTINGS["matmul medium"]():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
    assert wrong == []


def test_what_the_caller_sets_in_the_meantime_stays() -> None:
    with SETTINGS["matmul medium"]():
        with ambient.held():
            torch.set_float32_matmul_precision("high")
        assert torch.get_float32_matmul_precision() == "high"
