"""The forms in which this version runs the model: the one list that commands and the report go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate, empty_accelerated
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig
from happyhorse_fast.ops.runtime.dispatch import choose


@dataclass(frozen=True)
class Form:
    """One way to run the model.

    Attributes:
        name: Shown to the user.
        precision: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"fp8"``: of products.
        kernels: Whether it runs this package's kernels, so needs a GPU to be fast; False for plain torch.
    """

    name: str
    precision: Literal["fp32", "bf16", "int8", "fp8"]
    kernels: bool

    def eager(self, config: ModelConfig, device: str) -> HappyHorse:
        """The eager model that the form starts from, its weights not set yet."""
        return HappyHorse(config, torch.float32 if self.precision == "fp32" else torch.bfloat16, device=device)

    def apply(self, model: HappyHorse, attention: AttentionPrecision | None = None) -> HappyHorse:
        """Bring an eager model with its weights into the form, in place; on the CPU through backend reference."""
        if self.kernels:
            backend: Literal["auto", "reference"] = "auto" if model.device.type == "cuda" else "reference"
            accelerate(model, FastConfig(precision=self.precision, attention=attention, backend=backend))  # type: ignore[arg-type]
        return model

    def without_weights(self, config: ModelConfig, attention: AttentionPrecision | None = None) -> HappyHorse:
        """The form on ``"meta"``, to measure its memory; ``attention`` is its precision of attention."""
        if not self.kernels:
            return self.eager(config, "meta")
        fast = FastConfig(precision=self.precision, attention=attention)  # type: ignore[arg-type]  # not fp32, with kernels
        choices = choose("reference", fast.precision, torch.device("cpu"), attention=fast.attention_format)
        return empty_accelerated(config, fast, choices)


FORMS = (
    Form("eager float32", "fp32", kernels=False),
    Form("eager bfloat16", "bf16", kernels=False),
    Form("fast bfloat16", "bf16", kernels=True),
    Form("fast int8", "int8", kernels=True),
    Form("fast fp8", "fp8", kernels=True),
)
"""The first is what the others are measured against."""
