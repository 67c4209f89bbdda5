"""What attention runs in where nothing is asked for: by products and GPU, wherever a model is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from happyhorse_fast import golden
from happyhorse_fast.checkpoint import load as checkpoint
from happyhorse_fast.checkpoint import packed as packed_checkpoint
from happyhorse_fast.checkpoint.load import load
from happyhorse_fast.checkpoint.packed import save_packed
from happyhorse_fast.checkpoint.save import save_checkpoint
from happyhorse_fast.fast import accelerate as acceleration
from happyhorse_fast.fast import state as fast_state
from happyhorse_fast.fast.accelerate import accelerate, restore
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig, Precision, default_attention
from happyhorse_fast.fast.memory import peak_memory
from happyhorse_fast.tokens import tokens_for
from happyhorse_fast.verify.forms import FORMS


@pytest.fixture(scope="module")
def case() -> golden.GoldenCase:
    return golden.load_case("postnorm_v2_fp32")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every model one for a compute capability."""

    def pretend(arch: int | None) -> None:
        for module in (acceleration, checkpoint, packed_checkpoint, fast_state):
            monkeypatch.setattr(module, "compute_capability", lambda device: arch)

    return pretend


def ran(model: Any) -> list[str]:
    return [layer.plan.precision["attention"] for layer in model.block.layers]


@pytest.mark.parametrize("arch", [None, 80, 86, 89, 90, 100, 120])
def test_by_products_and_gpu(arch: int | None) -> None:
    assert default_attention("bf16", arch) == "bf16"
    precisions: tuple[Precision, ...] = ("int8", "fp8")
    for precision in precisions:
        wanted = "bf16" if arch in (100, 120) else "int8_qk"
        fast = FastConfig(precision=precision, skip=["attention:1", "down"])
        assert fast.on(arch).attention == default_attention(precision, arch) == wanted
        assert fast.attention is None and fast.on(arch).skip == fast.skip
        assert fast.on(arch).precision_of("attention", 1) == "bf16"
    formats: tuple[AttentionPrecision, ...] = get_args(AttentionPrecision)
    for attention in formats:
        assert FastConfig(precision="fp8", attention=attention).on(arch).attention == attention


@pytest.mark.parametrize(("arch", "wanted"), [(90, "int8_qk"), (100, "bf16")])
def test_wherever_a_model_is_made(arch: int, wanted: str, case: golden.GoldenCase, on_gpu: Any, tmp_path: Path) -> None:
    fast = FastConfig(precision="fp8", backend="reference", skip=["attention:0"])
    layers = ["bf16"] + [wanted] * (case.config.num_layers - 1)
    on_gpu(arch)
    model = case.model(torch.bfloat16)
    save_checkpoint(model, tmp_path / "published")
    assert ran(accelerate(model, fast)) == layers
    restore(model)
    loaded = load(tmp_path / "published", config=case.config, fast=fast, progress=False)
    assert ran(loaded) == layers
    on_gpu(190 - arch)  # packed on the other one
    save_packed(load(tmp_path / "published", config=case.config, fast=fast, progress=False), tmp_path / "packed")
    on_gpu(arch)
    assert ran(load(tmp_path / "packed", progress=False)) == layers
    for attention in (None, "fp8"):
        other = FastConfig(precision="fp8", attention=attention, skip=["attention:0"], backend="reference")
        assert (
            ran(load(tmp_path / "packed", fast=other, progress=False))
            == ["bf16", *[attention or wanted] * 5][: len(layers)]
        )


@pytest.mark.parametrize("form", [form for form in FORMS if form.kernels], ids=lambda form: form.name)
def test_memory_of_every_form_can_be_planned(form: Any, case: golden.GoldenCase) -> None:
    model = form.without_weights(case.config)
    assert set(ran(model)) == {default_attention(form.precision)}
    assert peak_memory(model, tokens_for("256p", "16:9", 3), 10).peak_bytes > 0
