"""Put the fast layers in place of a model's own, take them out again, and say what runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from happyhorse_fast import ambient
from happyhorse_fast.config import OPS, ModelConfig
from happyhorse_fast.eager.lora import unmerge
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.sizes import TensorSpec, sizes_of
from happyhorse_fast.fast import model as fast_model
from happyhorse_fast.fast.compiled import load_compiler, state_dict_of, untraced, unwrapped
from happyhorse_fast.fast.config import FastConfig, Tiles
from happyhorse_fast.fast.layer import FastLayer, empty_layer
from happyhorse_fast.fast.plan import LayerPlan
from happyhorse_fast.fast.refusals import require_acceleratable
from happyhorse_fast.fast.state import FastState, is_accelerated
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.ops.runtime.checks import compute_capability
from happyhorse_fast.ops.runtime.dispatch import Choice, choose, is_hopper
from happyhorse_fast.ops.runtime.formats import uses_e4m3
from happyhorse_fast.parallel.sharded import is_sharded

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


@ambient.makes_tensors
def accelerate(model: Model, fast: FastConfig | None = None, *, report: Callable[[str], None] | None = None) -> Model:
    """Replace a model's layers by fast ones, in place, one layer at a time. For inference: it has no gradients.

    Beside the model itself at most one layer's packed weights are held at any time; the layers it replaces move to the
    CPU (or are dropped, see :class:`FastConfig`).

    Args:
        model: A :class:`HappyHorse`, or a model object of the public implementation, whose forward keeps its signature.
            Whatever its compute dtype was, fast layers are in bf16, int8 or fp8. What ``torch.compile`` wraps is
            accelerated inside its wrapper.
        fast: What to do; bf16 and exact by default.
        report: Called with a line per kernel checked and per fallback; by default they are logged, the first as notes
            (INFO), the second as warnings.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is neither or wraps one, or ``fast`` is not a FastConfig.
        ValueError: The model carries what packed layers would leave out (hooks inside it, a forward of its own,
            parametrised, sharded or quantised weights, ...), is accelerated already or on ``"meta"``, has a tensor of a
            dtype that it is not published in, its head_dim is not 32, 64 or 128, or ``fast`` names a layer that it does
            not have.
        BackendError: A backend that was asked for, or that ``strict`` needs, cannot run here.
    """
    fast = FastConfig() if fast is None else fast
    if not isinstance(fast, FastConfig):
        raise TypeError(f"fast must be a FastConfig, got {type(fast).__name__}")
    inner: Any = unwrapped(model)
    if is_accelerated(inner):
        raise ValueError("model is accelerated already; call restore(model) first")
    require_acceleratable(inner, fast)
    if getattr(inner, "ranks", None) is not None:
        raise ValueError("model is parallelized already; call restore(model), accelerate(model), then parallelize it")
    config = _config_of(inner)
    fast.require_model(config)
    device = next(inner.parameters()).device
    if device.type == "meta":
        raise ValueError("model must hold data to be packed, it is on the meta device: load(...) fills and packs one")
    choices = choose_ops(fast.on(compute_capability(device)), device, report)
    state = FastState(config, fast, choices, type(inner))
    layers: Any = inner.block.layers
    try:
        for index, layer in enumerate(layers):
            packed = state.pack(index, state_dict_of(layer), device)
            if fast.originals == "cpu":
                state.originals.append(layer)  # before it moves, so that no interruption loses it
                layer.to("cpu")
            layers[index] = packed
            del layer, packed
    except BaseException:  # out of memory, Ctrl-C: the model is what it was, unless its layers were to be dropped
        for index, original in enumerate(state.originals):
            layers[index] = original.to(device)
        raise
    install(inner, state)
    return model


def empty_accelerated(
    config: ModelConfig, fast: FastConfig, choices: Mapping[str, Choice], arch: int | None = None
) -> HappyHorse:
    """An accelerated model on ``"meta"``, its packed weights to be filled in; to load into, or to measure.

    Args:
        config: The model's configuration.
        fast: How it is accelerated.
        choices: Implementation per op.
        arch: Compute capability that it is for.
    """
    model = HappyHorse(config, device="meta")
    layers: Any = model.block.layers
    for index in range(config.num_layers):
        plan = LayerPlan.of(config, fast.on(arch), index, choices)
        layers[index] = empty_layer(layers[index].state_dict(), plan)
    install(model, FastState(config, fast, dict(choices)))
    return model


def choose_ops(fast: FastConfig, device: torch.device, report: Callable[[str], None] | None) -> dict[str, Choice]:
    """The implementation of every op, with fallbacks said once."""
    load_compiler()
    with untraced():  # a self-check's verdict is remembered
        choices = choose(
            fast.backend,
            fast.precision,
            device,
            attention=fast.attention,
            mixed=bool(fast.skip),
            strict=fast.strict,
            report=report or logger.info,
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for choice in choices.values():
        if choice.fell_back:
            reasons.setdefault((choice.backend, choice.reason), []).append(choice.op)
    for (backend, reason), ops in reasons.items():
        which = "every op" if len(ops) == len(choices) else ", ".join(ops)
        where = "in plain torch (backend reference)" if backend == "reference" else f"on backend {backend}"
        verb = "runs" if len(ops) in (1, len(choices)) else "run"
        line = f"{which} {verb} {where}: {reason}"
        if device.type == "cuda" and backend == "reference" and "block_sparse_attention" in ops:
            # 502 x 502 blocks in 40 layers at 0.2 ms, some 20 launches of 10 us each: 34 minutes.
            line += "; attention in plain torch is for short clips: half an hour a step of a dense model at 1080p"
        (report or logger.warning)(line)
    return choices


def install(model: nn.Module, state: FastState) -> None:
    """Make the model run its packed layers."""
    published: Any = model
    state.take_bands(published.adapter.rope.bands)
    model.fast = state  # type: ignore[assignment]
    model.__class__ = fast_model.accelerated_class(type(model))  # type: ignore[arg-type]


@ambient.makes_tensors
def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, :func:`parallelize` and every :func:`merge_lora`, in place, bit for bit.

    Args:
        model: An accelerated model, with ``FastConfig(originals="cpu")``; or a parallelized one, or one with LoRAs
            merged into it.

    Returns:
        ``model`` itself, of the class it had, on the device where it is now.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: The model is none of them, or an eager one whose weights are sharded over ranks; its original
            weights were dropped, or merged ones were changed since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module that accelerate, parallelize or merge_lora took, got {model!r}")
    inner: Any = unwrapped(model)
    if not is_accelerated(inner):
        parallelized = getattr(inner, "ranks", None) is not None
        if parallelized:
            if any(map(is_sharded, inner.block.layers)):
                raise ValueError("the weights are sharded over ranks (shard_weights=True); load the checkpoint again")
            inner.ranks = None
        if unmerge(inner) or parallelized:
            return model
        raise ValueError("model is not accelerated; there is nothing to restore")
    state: FastState = inner.fast
    if not state.originals:
        raise ValueError(
            'the original weights were dropped (FastConfig(originals="drop"), or a model loaded with fast=...); '
            "load the checkpoint again without fast="
        )
    device = next(inner.parameters()).device
    state.restored = True  # before a layer goes, for calls in other threads
    layers: Any = inner.block.layers
    for index in range(len(layers)):
        layers[index] = None  # free the packed weights first, so that no layer is on the device twice
        layers[index] = state.originals[index].to(device)
    inner.__class__ = state.eager_class
    del inner.fast
    unmerge(inner)
    return model


@dataclass(frozen=True)
class Explanation:
    """How one op of one layer runs.

    Attributes:
        layer: Layer number.
        op: The op.
        precision: ``"bf16"``, ``"int8"`` or ``"fp8"``, of the product the op is or feeds; of attention one of
            `quantize.ATTENTION`; eager: the compute dtype.
        backend: The implementation, or ``"eager"``.
        mask: For attention: ``"dense"``, ``"window"`` or the sparsity policy.
        reason: Why this implementation, and why not a faster one; of attention also which softmax it has, and why.
    """

    layer: int
    op: str
    precision: str
    backend: str
    mask: str
    reason: str


def explain(model: nn.Module) -> list[Explanation]:
    """Which implementation runs, per layer and op, and why not a faster one.

    Args:
        model: Accelerated or not; in an eager model the five products of every layer are named.

    Returns:
        One entry per layer and op, layer by layer.

    Raises:
        TypeError: The model is of neither kind that :func:`accelerate` takes.
    """
    model = unwrapped(model)
    if is_accelerated(model):
        return list(_explanations(model.fast, model.block.layers))  # type: ignore[arg-type,union-attr]
    config = _config_of(model)
    dtype = str(getattr(model, "compute_dtype", torch.bfloat16)).removeprefix("torch.")
    why = "the model is not accelerated; call accelerate(model)"
    return [
        Explanation(i, op, dtype, "eager", _exact_mask(i in config.local_attn_layers) if op == "attention" else "", why)
        for i in range(config.num_layers)
        for op in OPS
    ]


def _exact_mask(local: bool) -> str:
    return "window" if local else "dense"


def _explanations(state: FastState, layers: Any) -> Iterator[Explanation]:
    products = {
        "rmsnorm_quantize": "qkv",
        "qkv_linear": "qkv",
        "select_blocks": "attention",
        "block_sparse_attention": "attention",
        "quantize_rows": "proj",
        "fp8_linear_residual": "proj",
        "fp8_linear_activation": "up",
        "fp8_linear": "down",
    }
    for layer in layers:
        plan: LayerPlan = layer.plan
        post_norm = hasattr(layer, "attn_post_norm")
        runs = {
            "fp8_linear": post_norm,
            "fp8_linear_residual": not post_norm,
            "select_blocks": plan.sparse and not isinstance(state.fast.sparsity, Tiles),
            "quantize_rows": "int8" in (plan.precision["proj"], plan.precision["down"]),
        }
        for op, choice in state.choices.items():
            if not runs.get(op, True):
                continue
            mask, reason, precision = "", choice.reason, plan.precision[products[op]]
            if op == "block_sparse_attention":
                mask = repr(state.fast.sparsity) if plan.sparse else _exact_mask(plan.local)
                reason = f"{reason}; {_softmax(layer)}"
            elif _in_hopper(layer, op, precision):
                reason = f"{reason}; in the Hopper kernel, where TMA can read x and weight"
            if op == "quantize_rows":
                precision = "int8"
            yield Explanation(plan.index, op, precision, choice.backend, mask, reason)


def _in_hopper(layer: FastLayer, op: str, precision: str) -> bool:
    """Whether an op of a layer runs in Triton's kernel for Hopper."""
    plan, device = layer.plan, layer.qkv_weight.device
    return plan.backend.get(op) == "triton" and is_hopper(
        op, precision, device, head_dim=plan.head_dim, activation=layer.activation
    )


def _softmax(layer: FastLayer) -> str:
    """Which softmax the layer's attention has, and why; on a GPU with a kernel for Hopper, also which kernel runs."""
    precision = layer.plan.precision["attention"]
    e4m3 = uses_e4m3(precision)
    said = "running maximum, which P in e4m3 needs" if e4m3 else layer.bound.softmax
    if _in_hopper(layer, "block_sparse_attention", precision):
        if e4m3 or layer.bound.effective <= LIMIT:
            said += "; in the Hopper kernel"
        else:
            said += "; in plain Triton, Hopper's kernel is for bounded scores"
    return said


def _config_of(model: nn.Module) -> ModelConfig:
    if isinstance(model, HappyHorse):
        return model.config
    try:
        layers = list(model.block.layers)  # type: ignore[union-attr,arg-type]
        local = [i for i, layer in enumerate(layers) if layer.attention.config.use_local_attn]
    except AttributeError as error:
        raise TypeError(
            "model must be a HappyHorse or a model object of the public implementation (adapter, block.layers, "
            f"final_norm_video, ...); got {type(model).__name__}: {error}"
        ) from error
    entries = {
        key: TensorSpec(key, Path("model"), "F32", tuple(value.shape)) for key, value in state_dict_of(model).items()
    }
    return ModelConfig(**sizes_of(entries, Path("model")), local_attn_layers=tuple(local))
