"""The forms in which this version runs the model: the one list that ``demo``, ``plan`` and ``doctor`` go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from happyhorse_fast.config import ModelConfig

if TYPE_CHECKING:
    from happyhorse_fast.reference.model import HappyHorse


@dataclass(frozen=True)
class Form:
    """One way to run the model.

    Attributes:
        name: Shown to the user.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp8"``: of products and attention.
        kernels: Whether it runs this package's kernels, so needs a GPU to be fast; False for plain torch.
        build: (config, device) -> the model, its weights not set yet.
    """

    name: str
    precision: str
    kernels: bool
    build: Callable[[ModelConfig, str], HappyHorse]


def _eager(dtype: str, config: ModelConfig, device: str) -> HappyHorse:
    import torch

    from happyhorse_fast.reference.model import HappyHorse

    return HappyHorse(config, getattr(torch, dtype), device=device)


FORMS = (
    Form("eager float32", "fp32", kernels=False, build=partial(_eager, "float32")),
    Form("eager bfloat16", "bf16", kernels=False, build=partial(_eager, "bfloat16")),
)
"""The first is what the others are measured against; a later form of a precision is preferred to an earlier one."""


def form_of(precision: str) -> Form | None:
    """The preferred form of a precision, None where this version has none."""
    return next((form for form in reversed(FORMS) if form.precision == precision), None)
