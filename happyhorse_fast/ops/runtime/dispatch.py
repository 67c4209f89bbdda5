"""Which implementation of an op runs, decided before the call and remembered with its reason."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from happyhorse_fast import optional
from happyhorse_fast.kernels.launch import HOPPER_HEAD_DIM, config_for
from happyhorse_fast.ops.runtime import self_check, trust
from happyhorse_fast.ops.runtime.checks import compute_capability
from happyhorse_fast.ops.runtime.cuda.launch import cuda_obstacle
from happyhorse_fast.ops.runtime.formats import ACTIVATION, ATTENTION_OUT, QKV, VARIANTS, qk_format
from happyhorse_fast.ops.runtime.obstacles import BackendError, triton_obstacle

STEMS = {
    "rmsnorm_quantize": "qkv",
    "quantize_rows": "row_quantization",
    "qkv_linear": "qkv",
    "select_blocks": "block_selection",
    "block_sparse_attention": "attention",
    "fp8_linear": "linear",
    "fp8_linear_residual": "linear",
    "fp8_linear_activation": "linear",
}
"""Every op the fast model calls, and the stem its kernel, tests and benchmark cases go by."""

PREFERENCES = Path(__file__).with_name("preferences.json")
"""{"90": {"fp8": ["rmsnorm_quantize"]}}: ops that committed results show faster in CUDA than in Triton on an
architecture in a format, of `select_blocks` and attention their own, where both were verified; `make report` writes it.
"""

INTERPRETED_IS_SLOW: str | None = "Triton's interpreter is for tests; ask for backend 'triton' to run it"


@dataclass(frozen=True)
class Choice:
    """An op's implementation.

    Attributes:
        op: The op.
        backend: ``"triton"``, ``"cuda"`` or ``"reference"``.
        reason: Why this one, and why not a faster one.
        fell_back: Whether it is not what was asked for, or ``"auto"`` had to take a slower one than there is.
    """

    op: str
    backend: str
    reason: str
    fell_back: bool = False


def choose(
    backend: str,
    precision: str,
    device: torch.device,
    *,
    attention: str | None = None,
    mixed: bool = False,
    strict: bool = False,
    report: Callable[[str], None] | None = None,
) -> dict[str, Choice]:
    """The implementation of every op.

    ``"auto"`` takes, of the kernels that can run on the device and passed their self-check there, Triton's, or CUDA's
    where committed results show it faster or Triton's may not run; else the reference. A backend that is named is taken
    as it is; ops that ``"cuda"`` has no kernel for run as under ``"auto"``.

    Args:
        backend: ``"auto"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
        precision: ``"bf16"``, ``"int8"`` or ``"fp8"``.
        device: Where the model is.
        attention: Precision of attention: one of `quantize.ATTENTION`; None: of 8 bits where products are.
        mixed: Whether the model keeps some products in bf16 all the same.
        strict: Raise instead of falling back.
        report: Called with a line per kernel that is checked now.

    Returns:
        A choice per op of :data:`STEMS` that a model of this precision can call.

    Raises:
        BackendError: A named backend cannot run here, ``strict`` and an op has no kernel that may run, or a check ended
            this process's use of the GPU.
    """
    optional.hide_broken_triton()  # torch's tracer, which an accelerated model is prepared for, imports it
    attention = attention or ("int8_qk" if precision == "int8" else precision)
    formats = {op: of for op in STEMS if (of := checked_formats(op, precision, attention, mixed=mixed))}
    if backend == "reference":
        return {op: Choice(op, "reference", "asked for") for op in formats}
    in_cuda = cuda_ops(precision, attention, mixed=mixed)
    named = {"triton": tuple(formats), "cuda": in_cuda}.get(backend, ())
    if named:
        obstacle = triton_obstacle(device) if backend == "triton" else cuda_obstacle(device)
        if obstacle is not None:
            raise BackendError(f"backend {backend!r} cannot run: {obstacle}")
    # The format that benchmark cases are named by, and PREFERENCES.
    of_op = {"select_blocks": qk_format(attention), "block_sparse_attention": attention}
    own = {op: of_op.get(op, precision) for op in formats}
    # Found out when it is first asked for, once: a self-check takes seconds.
    why_not = functools.cache(lambda of: _obstacles(of, formats, device, report))
    choices = {}
    for op in formats:
        if op in named:
            choices[op] = Choice(op, backend, "asked for")
            continue
        choice = _best(op, own[op], op in in_cuda, device, why_not)
        if named:
            reason = f"no {backend} kernel of it in {own[op]}; {choice.reason}"
            choice = Choice(op, choice.backend, reason, fell_back=True)
        if strict and choice.fell_back:
            where = "plain torch" if choice.backend == "reference" else choice.backend
            raise BackendError(f"strict: {op} would run as {where}: {choice.reason}")
        choices[op] = choice
    return choices


@functools.cache
def op_choice(op: str, device: torch.device) -> Choice:
    """The implementation of one op in bf16 under ``"auto"``, for tensors of any model; the self-check is of it alone.

    Args:
        op: Of :data:`STEMS`.
        device: Where the tensors are, with its index where there are several.

    Raises:
        BackendError: The check ended this process's use of the GPU.
    """
    optional.hide_broken_triton()
    in_cuda = "bf16" in VARIANTS["cuda"].get(op, ())
    return _best(op, "bf16", in_cuda, device, lambda of: _obstacles(of, {op: ("bf16",)}, device, None))


def cuda_ops(precision: str, attention: str | None, *, mixed: bool = False) -> tuple[str, ...]:
    """Ops of a model that have a CUDA kernel in every format they run in; arguments as for :func:`choose`."""
    found = {op: set(checked_formats(op, precision, attention, mixed=mixed)) for op in STEMS}
    return tuple(op for op, formats in found.items() if formats and formats <= set(VARIANTS["cuda"].get(op, ())))


def checked_formats(op: str, precision: str, attention: str | None, *, mixed: bool = False) -> tuple[str, ...]:
    """The formats of :data:`VARIANTS` that a model runs an op in, none where it has no use for it.

    Arguments are those of :func:`choose`.
    """
    of_products, of_attention = (
        (own, "bf16") if mixed and own != "bf16" else (own,) for own in (precision, attention or precision)
    )
    # Of int8 what a product takes is bf16 first: `quantize_rows` makes codes of it.
    results = ["bf16" if p == "int8" else p for p in of_products]
    pairs: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str | None]]] = {
        "qkv_linear": (QKV, of_products, [*of_attention]),
        "fp8_linear_activation": (ACTIVATION, of_products, [*results]),
        "block_sparse_attention": (ATTENTION_OUT, of_attention, [*results, None]),
    }
    if op in pairs:
        names, firsts, seconds = pairs[op]
        return tuple(name for name, (first, second) in names.items() if first in firsts and second in seconds)
    if op == "quantize_rows":
        return tuple(p for p in of_products if p == "int8")
    return tuple(map(qk_format, of_attention)) if op == "select_blocks" else of_products


def _best(op: str, fmt: str, in_cuda: bool, device: torch.device, why_not: Callable[[str], dict[str, str]]) -> Choice:
    """The first kernel that may run, with what keeps others from it; ``why_not`` has that of the ops by backend."""
    order = ["triton"]
    if in_cuda and device.type == "cuda":  # on a CPU only tests run them
        order.insert(0 if op in preferred(fmt, device) else 1, "cuda")
    kept: list[str] = []
    for backend in order:
        reason = why_not(backend).get(op)
        if reason is None:
            return Choice(op, backend, "; ".join(["passed its self-check on this machine", *kept]))
        kept.append(reason)
    return Choice(op, "reference", "; ".join(kept), fell_back=True)


def _obstacles(
    backend: str, formats: dict[str, tuple[str, ...]], device: torch.device, report: Callable[[str], None] | None
) -> dict[str, str]:
    """Why a backend's kernels may not run, of every op whose may not."""
    obstacle = triton_obstacle(device) if backend == "triton" else cuda_obstacle(device)
    if obstacle is None and device.type != "cuda":
        obstacle = INTERPRETED_IS_SLOW
    return dict.fromkeys(formats, obstacle) if obstacle else _failures(backend, formats, device, report)


def is_hopper(op: str, precision: str, device: torch.device, *, head_dim: int, activation: str = "") -> bool:
    """Whether Triton runs an op on ``device`` in its Hopper kernel, in Gluon, wherever tiles can be described.

    Args:
        op: Of :data:`STEMS`.
        precision: Its format; attention's is one of `quantize.ATTENTION`.
        device: Where the model is.
        head_dim: Channels per head.
        activation: Of the MLP, where the op is.
    """
    arch = compute_capability(device)
    variant = {
        "qkv_linear": f"qkv_{precision}",
        "block_sparse_attention": f"{precision}_d{head_dim}",
        "fp8_linear_residual": f"{precision}_residual",
        "fp8_linear_activation": f"{precision}_{activation}",
    }.get(op)
    if arch is None or variant is None or (op == "qkv_linear" and head_dim != HOPPER_HEAD_DIM):
        return False
    try:
        return config_for(STEMS[op], variant, arch).hopper
    except LookupError:  # no such kernel there
        return False


def preferred(fmt: str, device: torch.device) -> tuple[str, ...]:
    """Ops that run in CUDA rather than in Triton in a format on this device's architecture: :data:`PREFERENCES`."""
    return tuple(_preferences(PREFERENCES).get(str(compute_capability(device)), {}).get(fmt, ()))


@functools.cache
def _preferences(file: Path) -> dict[str, dict[str, list[str]]]:
    loaded: dict[str, dict[str, list[str]]] = json.loads(file.read_text())
    return loaded


def _failures(
    backend: str, formats: dict[str, tuple[str, ...]], device: torch.device, report: Callable[[str], None] | None
) -> dict[str, str]:
    """Ops whose kernel failed its self-check in one of its formats, with what was found; checks what is not known.

    Raises:
        BackendError: A kernel ended this process's use of the GPU. That is remembered, and the next process goes on.
    """
    needed = {(op, f) for op, ours in formats.items() for f in ours if f in VARIANTS[backend].get(op, ())}
    failed: list[tuple[str, str, str]] = []
    for check, new in trust.checked(backend, device, needed):
        if new and report is not None:
            verdict = "passed" if check.passed else "FAILED"
            report(f"self-check {check.op} {check.variant}: {verdict} ({check.detail}, {check.seconds:.1f} s)")
        if new and check.fault == self_check.LOST:
            raise BackendError(
                f"{backend}'s {check.op} in {check.variant} ended this process's use of {device}: {check.detail}; "
                "restart the process: it goes on without that kernel"
            )
        failed += [] if check.passed else [(check.op, check.variant, check.detail)]
    # Of an op that fails in several formats the first by name.
    worst = sorted(failed, reverse=True)
    return {op: f"{backend}'s self-check failed in {variant}: {detail}" for op, variant, detail in worst}
