"""Time each op of a forward pass, in every form of the model, on the device's own clock."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from happyhorse_fast.arguments import require_whole
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import OUTSIDE, step_costs
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig
from happyhorse_fast.tokens import ClipTokens
from happyhorse_fast.verify.forms import FORMS, Form

PACKAGE = "happyhorse_fast::"
PRODUCTS, ATTENTION, OTHER = "products", "attention", "other"
"""Names of what eager torch runs."""
COSTED = {
    "block_sparse_attention": ("attention",),
    "fp8_linear_activation": ("up",),
    "fp8_linear_residual": ("proj", "down"),
    "qkv_linear": ("qkv",),
    "attention": ("attention",),
    "products": ("qkv", "proj", "up", "down"),  # of an eager pass; in an accelerated one they are outside the layers
}
"""Name of an op -> its parts in :mod:`happyhorse_fast.costs`."""
SEED = 0


def moment(on_gpu: bool) -> Any:
    """Now: an event on a GPU's current stream, recorded without waiting for it, else seconds of the host's clock."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def apart_ms(start: Any, end: Any) -> Any:
    """Milliseconds between two moments; events must have passed."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


class OpTimes(TorchDispatchMode):
    """Time every operation while the mode is entered: this package's by name, torch's as products, attention and other.

    CUDA events around each operation cost about 10 us of host time, which a forward pass of short ops does not hide:
    the sum over ops is then more than the pass takes without.

    Args:
        device: Where the operations run.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []  # name, start and end

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        start = moment(self._on_gpu)
        result = func(*args, **(kwargs or {}))
        self._spans.append((group_of(func._schema.name), start, moment(self._on_gpu)))
        return result

    def seconds(self) -> dict[str, float]:
        """Seconds by op, longest first; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        total: Counter[str] = Counter()
        for name, start, end in self._spans:
            total[name] += apart_ms(start, end) / 1e3
        return dict(total.most_common())

    def calls(self) -> dict[str, int]:
        """Calls by op."""
        return dict(Counter(name for name, _, _ in self._spans))


def group_of(name: str) -> str:
    """Name the group of an operation: ``"happyhorse_fast::qkv_linear_reference"`` is in ``"qkv_linear"``."""
    if name.startswith(PACKAGE):
        return name.removeprefix(PACKAGE).removesuffix("_reference").removesuffix("_cuda")
    base = name.removeprefix("aten::")
    if base in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm"):
        return PRODUCTS
    return ATTENTION if base.startswith("_scaled_dot_product") else OTHER


@dataclass(frozen=True)
class OpTime:
    """One op in a forward pass.

    Attributes:
        op: Its name.
        backend: What it runs on; ``"torch"`` where it is no op of this package.
        calls: In one pass.
        ms: All of them, the median of the passes.
        tflops: Useful TFLOP/s; None where the op has no product.
    """

    op: str
    backend: str
    calls: int
    ms: float
    tflops: float | None


@dataclass(frozen=True)
class FormTimes:
    """One form's forward pass.

    Attributes:
        form: Its name.
        attention: Precision of attention; None for an eager form.
        ms: Sum over ops, the median of the passes.
        ops: Longest first.
        fallbacks: Why ops are slower than they could be.
    """

    form: str
    attention: str | None
    ms: float
    ops: list[OpTime]
    fallbacks: list[str]


def time_forms(
    config: ModelConfig,
    clip: ClipTokens,
    *,
    text: int,
    repeats: int,
    device: torch.device,
    attention: AttentionPrecision | None = None,
    report: Callable[[str], object] = lambda form: None,
) -> list[FormTimes]:
    """Time the forward pass of a model with random weights on a clip, in every form but float32.

    Args:
        config: The model's configuration.
        clip: Latent size.
        text: Text tokens.
        repeats: Forward passes per form.
        device: Where to run; fp8 needs compute capability 8.9.
        attention: Precision of attention of the fast forms; None: each form's default.
        report: Called with the name of each form before its passes.

    Raises:
        ValueError: An argument is out of range.
    """
    require_whole("text", text, 1)
    require_whole("repeats", repeats, 1)
    FastConfig(attention=attention)  # raises what the first fast form would, minutes later
    fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    found = []
    # Events are of the current device, which need not be this one.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for form in FORMS:
            if form.precision == "fp32" or (form.precision == "fp8" and not fp8):
                continue
            report(form.name)
            found.append(time_form(form, config, clip, text, attention, repeats, device))
    return found


def random_inputs(config: ModelConfig, clip: ClipTokens, text: int, device: torch.device) -> list[torch.Tensor]:
    """Video [1, C, T, H, W], audio [1, A, Ca] and text [1, L, Ct] of a clip, standard normal, drawn on the device."""
    draw = torch.Generator(device).manual_seed(SEED)
    return [torch.randn(shape, generator=draw, device=device) for shape in clip.shapes(config, text).values()]


def time_form(
    form: Form,
    config: ModelConfig,
    clip: ClipTokens,
    text: int,
    attention: AttentionPrecision | None,
    repeats: int,
    device: torch.device,
) -> FormTimes:
    """One form; arguments as :func:`time_forms` takes them."""
    model = form.apply(form.eager(config, str(device)).init_weights(SEED), attention)
    choices: dict[str, Any] = model.fast.choices if form.kernels else {}  # type: ignore[union-attr,assignment]
    inputs = random_inputs(config, clip, text, device)
    passes, calls = [], {}
    with torch.no_grad():
        model(*inputs)  # compiles, and makes what depends on the clip's shape
        for _ in range(repeats):
            with OpTimes(device) as times:
                model(*inputs)
            passes.append(times.seconds())
            calls = times.calls()
    flops: Counter[str] = Counter()
    for cost in step_costs(config, clip, text=text):
        if cost.kind != OUTSIDE:
            flops[cost.op] += cost.count * cost.flops  # type: ignore[assignment]
    ops = []
    for name in passes[0]:
        taken = statistics.median(each.get(name, 0.0) for each in passes)
        parts = COSTED.get(name, ())
        if name == PRODUCTS:  # without a fused kernel, attention is two of them
            parts = () if form.kernels else parts if ATTENTION in passes[0] else (*parts, "attention")
        done = sum(flops[part] for part in parts)
        backend = choices[name].backend if name in choices else "torch"
        ops.append(OpTime(name, backend, calls[name], 1e3 * taken, done / taken / 1e12 if done and taken else None))
    total = statistics.median(sum(each.values()) for each in passes)
    fallbacks = sorted({choice.reason for choice in choices.values() if choice.fell_back})
    layer: Any = model.block.layers[0]
    of_attention = layer.plan.precision["attention"] if form.kernels else None
    return FormTimes(form.name, of_attention, 1e3 * total, ops, fallbacks)
