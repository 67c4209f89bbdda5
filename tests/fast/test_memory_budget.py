"""Memory of the full 15B model at 1080p under fake tensors, weights included, against what a card must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.fast import layer as fast_layer
from happyhorse_fast.fast.accelerate import empty_accelerated
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.memory import PeakMemory, peak_memory
from happyhorse_fast.ops.runtime.dispatch import choose
from happyhorse_fast.tokens import tokens_for

CONFIG = ModelConfig.preset("happyhorse-1.0-15b")


def peak(precision: Any, seconds: int) -> PeakMemory:
    choices = choose(
        "reference", precision, torch.device("cpu")
    )  # fakes and their shapes are the same for every backend
    model = empty_accelerated(CONFIG, FastConfig(precision=precision), choices)
    return peak_memory(model, tokens_for("1080p", "16:9", seconds, 24))


@pytest.mark.parametrize(
    ("precision", "seconds", "budget"),
    [("fp8", 5, 18.5), ("int8", 5, 18.5), ("bf16", 5, 34.0), ("fp8", 15, 21.8), ("int8", 15, 21.8)],
)
def test_peak_fits(precision: str, seconds: int, budget: float) -> None:
    measured = peak(precision, seconds)
    peak_gib = measured.peak_bytes / 2**30
    assert peak_gib <= budget, f"measured {peak_gib:.2f} GiB at {measured.operation}"
    assert peak_gib > measured.weight_bytes / 2**30 + 1.2, "the residual stream alone is 1.2 GiB"


def test_a_whole_up_projection_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = fast_layer.fp8_linear_activation

    def with_a_product(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        planted = torch.empty(x.shape[0], 27304, device=x.device)
        result = as_it_is(x, *arguments, **options)
        del planted
        return result

    monkeypatch.setattr(fast_layer, "fp8_linear_activation", with_a_product)
    assert peak("fp8", 5).peak_bytes > 19 * 2**30
