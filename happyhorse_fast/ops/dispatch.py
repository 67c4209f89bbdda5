"""Which implementation of an op runs, decided before the call and remembered with its reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

STEMS = {
    "rmsnorm_quantize": "rmsnorm_qkv",
    "qkv_linear": "rmsnorm_qkv",
    "select_blocks": "select_blocks",
    "block_sparse_attention": "block_sparse_attention",
    "fp8_linear": "fp8_linear",
    "fp8_linear_residual": "fp8_linear",
    "fp8_linear_activation": "fp8_linear",
}
"""Every op the fast model calls, and the stem its kernel, tests and benchmark cases go by."""


INTERPRETED_IS_SLOW: str | None = "Triton's interpreter is for tests; ask for backend 'triton' to run it"


@dataclass(frozen=True)
class Choice:
    """An op's implementation.

    Attributes:
        op: The op.
        backend: ``"triton"``, ``"cuda"`` or ``"reference"``.
        reason: Why this one, and why not a faster one.
        fell_back: Whether ``"auto"`` had to take a slower one than there is.
    """

    op: str
    backend: str
    reason: str
    fell_back: bool = False


class BackendError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why."""


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run for tensors on ``device``; None where they can.

    On the CPU they run in Triton's interpreter only, which is for tests: about 10 s a layer at 1,750 tokens.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return None
    from triton.runtime.interpreter import InterpretedFunction

    from happyhorse_fast.kernels import numerics

    if isinstance(numerics.to_e4m3, InterpretedFunction):
        return None
    return f"Triton kernels need a GPU, the model is on {device} (TRITON_INTERPRET=1 runs them slowly on the CPU)"


def choose(
    backend: str,
    precision: str,
    device: torch.device,
    *,
    strict: bool = False,
    report: Callable[[str], None] | None = None,
) -> dict[str, Choice]:
    """The implementation of every op.

    ``"auto"`` takes Triton's kernel where there is a GPU and the kernel passed its self-check on it, else the
    reference. A backend that is named is taken as it is.

    Args:
        backend: ``"auto"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
        precision: ``"bf16"`` or ``"fp8"``.
        device: Where the model is.
        strict: With ``"auto"``: raise instead of falling back.
        report: Called with a line per kernel that is checked now.

    Returns:
        A choice per op of :data:`STEMS`.

    Raises:
        BackendError: A named backend cannot run here, or ``strict`` and an op has no kernel that may run.
    """
    if backend == "reference":
        return {op: Choice(op, "reference", "asked for") for op in STEMS}
    if backend == "cuda":
        raise BackendError("backend 'cuda' is not part of this version; there are 'triton' and 'reference'")
    obstacle = triton_obstacle(device)
    if backend == "triton":
        if obstacle is not None:
            raise BackendError(f"backend 'triton' cannot run: {obstacle}")
        return {op: Choice(op, "triton", "asked for") for op in STEMS}
    if obstacle is None and device.type != "cuda":
        obstacle = INTERPRETED_IS_SLOW
    failed = {} if obstacle is not None else _failures("triton", precision, device, report)
    choices = {}
    for op in STEMS:
        reason = obstacle if obstacle is not None else failed.get(op)
        if reason is None:
            choices[op] = Choice(op, "triton", "passed its self-check on this machine")
        elif strict:
            raise BackendError(f"strict: {op} would run as plain torch: {reason}")
        else:
            choices[op] = Choice(op, "reference", reason, fell_back=True)
    return choices


def _failures(
    backend: str, precision: str, device: torch.device, report: Callable[[str], None] | None
) -> dict[str, str]:
    """Ops whose kernel failed its self-check in a format that ``precision`` uses, with what was found."""
    from happyhorse_fast.ops import self_check, trust

    fp8 = precision == "fp8"
    key = trust.machine_key(backend, device, fp8=fp8)
    checks = trust.recall(key)
    if checks is None:
        checks = []
        for check in self_check.run_checks(backend, device, fp8=fp8):
            checks.append(check)
            if report is not None:
                verdict = "passed" if check.passed else "FAILED"
                report(f"self-check {check.op} {check.variant}: {verdict} ({check.detail}, {check.seconds:.1f} s)")
        trust.remember(key, checks)
    return {c.op: f"its self-check failed in {c.variant}: {c.detail}" for c in checks if not c.passed}
