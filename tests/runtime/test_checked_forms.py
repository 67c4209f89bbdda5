"""The self-check has launched before what a model launches, in any precision and with any product skipped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from happyhorse_fast import golden
from happyhorse_fast.config import OPS
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast import clip_state
from happyhorse_fast.fast import layer as fast_layer
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig, TopK
from happyhorse_fast.ops.runtime import op_checks
from happyhorse_fast.ops.runtime.dispatch import checked_formats
from happyhorse_fast.ops.runtime.formats import VARIANTS
from happyhorse_fast.ops.runtime.self_check import CHECKS

CPU = torch.device("cpu")
DECISION = Path(__file__).parents[2] / "docs/decisions/0008-trust-by-self-check.md"
Forms = set[tuple[Any, ...]]


def layout(x: torch.Tensor) -> Any:
    return x.dtype, x.is_contiguous()


def one_scale(a: Any) -> Any:
    return None if a.x_scale is None else len(a.x_scale) == 1


FORMS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "rmsnorm_quantize": lambda a: (a.out, a.branch is not None),
    "quantize_rows": lambda a: (layout(a.x), a.hadamard),
    "qkv_linear": lambda a: (layout(a.x), a.out),
    "select_blocks": lambda a: (*map(layout, (a.q, a.k)), a.keep is None, a.pool),
    "block_sparse_attention": lambda a: (*map(layout, (a.q, a.k, a.v)), a.fp8_out, a.return_lse),
    "fp8_linear": lambda a: (layout(a.x), one_scale(a)),
    "fp8_linear_residual": lambda a: (layout(a.x), one_scale(a)),
    "fp8_linear_activation": lambda a: (layout(a.x), a.activation, a.fp8),
}
"""Forms that a call of an op has its kernel compiled for."""


def forms_in(module: ModuleType, patch: pytest.MonkeyPatch, forms: Forms) -> None:
    """Collect what every call of an op in a module is compiled for; the reference runs in the kernel's place."""

    def watch(op: str, real: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            named = inspect.signature(real).bind(*given, **options)
            named.apply_defaults()
            forms.add((op, *FORMS[op](SimpleNamespace(**named.arguments))))
            return real(*given, **options | {"backend": "reference"})

        return call

    for op in FORMS.keys() & vars(module).keys():
        patch.setattr(module, op, watch(op, getattr(module, op)))


@functools.cache
def forms_of_check(op: str, variant: str) -> frozenset[tuple[Any, ...]]:
    """Forms that the check of an op in a format is compiled for."""
    forms: Forms = set()
    with pytest.MonkeyPatch.context() as patch:
        forms_in(op_checks, patch, forms)
        patch.setattr(op_checks, "_launched", lambda *_, **__: ({"step": 128}, False))
        CHECKS[op]("triton", CPU, variant)
    return frozenset(forms)


def asked() -> Iterator[tuple[Any, Any, tuple[str, ...]]]:
    """(precision, attention, skip) of every kind of model: a skip is of a product that is not in bf16 anyway."""
    for precision in ("bf16", "int8", "fp8"):
        for attention in ("bf16", "int8_qk", "fp8"):
            yield precision, attention, ()
            for op in OPS:
                if (attention if op == "attention" else precision) != "bf16":
                    yield precision, attention, (op,)


def test_every_op_is_watched() -> None:
    assert FORMS.keys() == CHECKS.keys()


def test_a_model_waits_for_as_many_checks_as_are_told() -> None:
    waits: dict[str, set[int]] = {}
    for precision, attention, skip in asked():
        count = sum(len(checked_formats(op, precision, attention, mixed=bool(skip))) for op in FORMS)
        waits.setdefault("skip" if skip else precision, set()).add(count)
    most = max(waits.pop("skip"))
    assert waits == {"bf16": {7}, "int8": {8}, "fp8": {7}}
    told = " ".join(DECISION.read_text().split())
    assert f"in bf16 or fp8 waits for 7 checks, in int8 for 8, with skipped products for up to {most};" in told
    triton, cuda = (sum(map(len, VARIANTS[backend].values())) for backend in ("triton", "cuda"))
    assert f"there are {triton} of Triton's kernels and {cuda} of the CUDA ones" in told


@pytest.mark.quick(12)
@pytest.mark.parametrize(("precision", "attention", "skip"), list(asked()), ids=str)
def test_what_a_model_runs_is_what_is_checked(
    precision: Any, attention: Any, skip: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = golden.load_case("local_d128_fp32").config.replace(
        num_layers=3, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=(0,), post_norm_layers=(2,)
    )
    fast = FastConfig(backend="reference", precision=precision, attention=attention, skip=skip, sparsity=TopK(keep=0.5))
    model = accelerate(HappyHorse(config).init_weights(0), fast)
    run: Forms = set()
    for module in (fast_layer, clip_state):
        forms_in(module, monkeypatch, run)
    with torch.no_grad():
        model(torch.randn(1, 48, 1, 4, 4), torch.randn(1, 3, 64), torch.randn(1, 2, config.text_in_channels))
    ops = {op for op, *_ in run}
    assert ops == FORMS.keys() - ({"quantize_rows"} if precision != "int8" else set())
    formats = [(op, f) for op in ops for f in checked_formats(op, precision, attention, mixed=bool(skip))]
    assert all(f in VARIANTS["triton"][op] for op, f in formats)
    checked = frozenset().union(*(forms_of_check(*place) for place in formats))
    assert run <= checked, run - checked
