"""Whether kernels give right numbers on this machine: small shapes of every op against its reference, in seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from happyhorse_fast import ambient
from happyhorse_fast.block_map import BLOCK, BlockMap
from happyhorse_fast.budgets import (
    ATTENTION_DISTANCE_TENSOR_CORE,
    ATTENTION_DISTANCE_TENSOR_CORE_E4M3_OUT,
    measure,
    violations,
)
from happyhorse_fast.kernels.launch import DESCRIPTORS_SINCE
from happyhorse_fast.ops.block_sparse_attention import block_sparse_attention
from happyhorse_fast.ops.check_inputs import (
    CHANNELS,
    HEAD_DIM,
    HEADS_KV,
    HEADS_Q,
    ROWS,
    Compared,
    draw,
    inputs,
    packed_weight,
    ragged_tiles,
    row_tiles,
)
from happyhorse_fast.ops.check_select import check_select
from happyhorse_fast.ops.checks import require_backend
from happyhorse_fast.ops.formats import ACTIVATION, ORDER, QKV, VARIANTS, WITHOUT_E4M3
from happyhorse_fast.ops.fp8_linear import fp8_linear, fp8_linear_activation, fp8_linear_residual
from happyhorse_fast.ops.packing_qkv import pack_cos_sin, pack_qk_norm, pack_qkv_weight, static_qk_scale
from happyhorse_fast.ops.quantize_rows import quantize_rows
from happyhorse_fast.ops.rmsnorm_qkv import qkv_linear, rmsnorm_quantize
from happyhorse_fast.reference.attention_operands import attention_operands
from happyhorse_fast.reference.quantize import dequantize, quantize_static
from happyhorse_fast.reference.score_bound import LIMIT
from happyhorse_fast.reference.sparse_attention import output_scale, sparse_attention

# Kernel and reference share every rounding point, so they differ by rounding flips: a bf16 step on every element is
# 8e-6, an e4m3 step on one code in fifty 1e-4.
DISTANCE = 1e-5
CODE_DISTANCE = 1e-4

RAISED, LOST = "raised", "lost"
"""Faults of a check, see :class:`KernelCheck`."""


@dataclass(frozen=True)
class KernelCheck:
    """Outcome of one kernel in one format.

    Attributes:
        op: The op.
        variant: The format, as in :data:`VARIANTS`.
        passed: Whether every result was within its budget.
        detail: The worst measured distance, or what went wrong.
        seconds: Time it took, compilation included.
        fault: Empty where the numbers decided. :data:`RAISED`: the check could not be made now (no memory, no compiler,
            a full disk), which says nothing of the next process. :data:`LOST`: it ended this process's use of the GPU.
    """

    op: str
    variant: str
    passed: bool
    detail: str
    seconds: float
    fault: str = ""


def run_checks(
    backend: str, device: torch.device, *, fp8: bool, only: Collection[tuple[str, str]] | None = None
) -> Iterator[KernelCheck]:
    """Check every op of a backend on a device.

    Args:
        backend: ``"triton"`` or ``"cuda"``.
        device: Where to run.
        fp8: Whether to check the e4m3 formats too.
        only: The ops and formats to check, all where None.

    Yields:
        An outcome per op and format that the backend has. A kernel that raises has failed; the error is its detail. One
        that ends this process's use of the GPU, as an illegal address does, is the last: later ones would be blamed.

    Raises:
        ValueError: There is no such backend.
    """
    require_backend(backend, tuple(VARIANTS))
    for variant in ORDER if fp8 else WITHOUT_E4M3:
        for op, check in CHECKS.items():
            if variant not in VARIANTS[backend].get(op, ()) or (only is not None and (op, variant) not in only):
                continue
            start, fault = time.perf_counter(), ""
            try:
                with ambient.held():  # a caller's TF32 would fail a right kernel, and be remembered
                    passed, detail = _judge(check(backend, device, variant))
            except Exception as error:  # whatever a compiler or driver raises, the kernel is not to be used
                passed, detail = False, f"{type(error).__name__}: {error}"
                fault = LOST if _is_lost(device) else RAISED
            yield KernelCheck(op, variant, passed, detail, time.perf_counter() - start, fault)
            if fault == LOST:
                return


def _is_lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _judge(compared: Compared) -> tuple[bool, str]:
    worst = 0.0
    for name, (result, reference, distance) in compared.items():
        error = measure(result.cpu().float(), reference.cpu().float())
        found = violations(error, distance=distance, slope=None)
        if found:
            return False, f"{name}: {'; '.join(found)}"
        worst = max(worst, error.tile_distance)
    return True, f"worst tile distance {worst:.1e}"


def _check_rmsnorm(backend: str, device: torch.device, variant: str) -> Compared:
    norm, added = 0.2 * draw(1, 3, CHANNELS), draw(2, ROWS, CHANNELS).bfloat16()
    compared: Compared = {}
    # A kernel each; the model's residual stream has its branches added by the product before.
    for name, branch in (("", None), (", branch", added)):
        results = []
        for where, how in ((device, backend), (torch.device("cpu"), "reference")):
            hidden = draw(0, ROWS, CHANNELS).to(where)
            x, scale = rmsnorm_quantize(
                hidden,
                norm.to(where),
                row_tiles().to(where),
                None if branch is None else branch.to(where),
                out=variant,
                backend=how,
            )
            results.append((hidden, x if variant == "bf16" else x.float() * scale[:, None]))
        (hidden, x), (hidden_reference, x_reference) = results
        compared[f"hidden{name}"] = (hidden, hidden_reference, DISTANCE)
        compared[f"x{name}"] = (x, x_reference, CODE_DISTANCE if variant == "fp8" else DISTANCE)
    return compared


def _check_rows(backend: str, device: torch.device, variant: str) -> Compared:
    compared: Compared = {}
    # Of the 15B model's widths the one that fills its registers least evenly.
    for rows, channels, hadamard in ((ROWS, CHANNELS, False), (ROWS, CHANNELS, True), (8, 13696, True)):
        x = (draw(18, rows, channels) * draw(19, rows, 1).exp()).bfloat16()
        results = []
        for where, how in ((device, backend), (torch.device("cpu"), "reference")):
            codes, scale = quantize_rows(x.to(where), hadamard, backend=how)
            results.append(codes.float() * scale[:, None])
        compared[f"{channels} channels{', Hadamard' if hadamard else ''}"] = (results[0], results[1], DISTANCE)
    return compared


def _check_qkv(backend: str, device: torch.device, variant: str) -> Compared:
    fmt, out = QKV[variant]
    rows = 3 * ((HEADS_Q + 2 * HEADS_KV) * HEAD_DIM + HEADS_Q)
    weight = (draw(3, rows, CHANNELS) / CHANNELS**0.5).bfloat16()
    heads = {"experts": 3, "num_heads_q": HEADS_Q, "num_heads_kv": HEADS_KV, "head_dim": HEAD_DIM}
    packed, w_scale = pack_qkv_weight(weight, to=fmt, **heads)
    qk_norm = pack_qk_norm(0.2 * draw(4, 3 * HEAD_DIM), 0.2 * draw(5, 3 * HEAD_DIM), experts=3)
    angle = draw(6, ROWS, 3 * HEAD_DIM // 8)
    cos_sin = pack_cos_sin(torch.cat([angle.sin(), angle.cos()], dim=1))
    qk_scale = static_qk_scale(qk_norm) if out == "fp8" else None
    results = []
    for where, how in ((device, backend), (torch.device("cpu"), "reference")):
        x, x_scale = inputs(fmt, where)
        outs = qkv_linear(
            x,
            x_scale,
            packed.to(where),
            None if w_scale is None else w_scale.to(where),
            qk_norm.to(where),
            cos_sin.to(where),
            row_tiles().to(where),
            HEADS_Q,
            HEADS_KV,
            out=out,
            qk_scale=None if qk_scale is None else qk_scale.to(where),
            backend=how,
        )
        q, k, v, q_scale, k_scale, v_scale, gate = (t.cpu().float() for t in outs)
        if out == "int8_qk":
            q, k = q * q_scale[:, :, None], k * k_scale.repeat_interleave(128, dim=1).T[:, :, None]
        if out == "fp8":
            v = (v * v_scale.repeat_interleave(128, dim=1)[:, None]).permute(2, 0, 1)  # as the others: tokens first
        results.append({"q": q, "k": k, "v": v, "gate": gate[:, :, None]})
    codes = set() if out == "bf16" else {"q", "k"}
    codes |= {"v"} if out == "fp8" else set()
    return {
        name: (value, results[1][name], CODE_DISTANCE if name in codes else DISTANCE)
        for name, value in results[0].items()
    }


def _check_attention(backend: str, device: torch.device, variant: str) -> Compared:
    # Rows that see all, a window with partial blocks, and nothing.
    block_map = BlockMap.from_ranges(
        [(0, 200), (200, 384), (200, 384)], [(0, ROWS), (0, 300), (ROWS - 100, ROWS)], ROWS, ROWS
    )
    q, k, v = (draw(s, ROWS, h, HEAD_DIM) for s, h in ((7, HEADS_Q), (8, HEADS_KV), (9, HEADS_KV)))
    given: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "gate": torch.sigmoid(draw(10, ROWS, HEADS_Q))}
    given |= attention_operands(variant.removesuffix("_fp8_out"), q, k, v)
    # Forms of the softmax -> (bound, whether it is the bounded one, factor of q). Norms of these are at most 40; where
    # no bound is given, both forms are launched, and what the device finds lets one compute.
    softmax: dict[str, tuple[float | None, bool, float]] = {", running": (math.inf, False, 1.0)}
    if variant == "fp8":
        softmax = {"": (math.inf, False, 1.0)}
    else:
        softmax |= {", bounded": (LIMIT, True, 1.0)}
    if variant == "bf16":
        softmax |= {", found small": (None, True, 1.0), ", found large": (None, False, 30.0)}
    # A kernel may be launched in another way for an LSE; the model asks for none, and in fp8 for e4m3 out.
    plain, to_fp8, with_lse = (False, False), (True, False), (False, True)
    results_of = (to_fp8,) if variant.endswith("_fp8_out") else (plain, with_lse)
    if variant == "fp8":
        results_of = (*results_of, to_fp8)
    compared: Compared = {}
    for form, (bound, bounded, factor) in softmax.items():
        inputs = given | ({"q": given["q"] * factor} if factor != 1 else {})
        there: dict[str, Any] = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        wanted = [(*result, False) for result in results_of]
        if bound is not None and _by_descriptors(backend, there["q"], there["k"], there["v"], bounded=bounded):
            # torch.compile takes another kernel, which reads through pointers, for the result that a model asks for.
            wanted.append((results_of[-1][0], False, True))
        for fp8_out, lse, apart in wanted:
            operands = there | ({"k": _apart(there["k"])} if apart else {})
            out, out_scale, sums = block_sparse_attention(
                **operands,
                block_map=block_map.to(device),
                bound=bound,
                fp8_out=fp8_out,
                return_lse=lse,
                backend=backend,
            )
            options = _rounding(backend, operands["q"], operands["k"], operands["v"], bounded=bounded, lse=lse)
            if fp8_out:
                options |= {"out_scale": output_scale(given["v"], given.get("v_scale"), given["gate"])}
            exact, exact_sums = sparse_attention(
                **inputs, block_map=block_map, bounded=bounded, return_lse=lse, **options
            )
            name = f"out{form}{', e4m3' if fp8_out else ''}{', LSE' if lse else ''}{', pointers' if apart else ''}"
            if fp8_out:
                out, exact = dequantize(out, out_scale), dequantize(exact, options["out_scale"])
            compared[name] = (out, exact, attention_distance(variant, device, fp8_out=fp8_out))
            if lse:
                # Rows without a key must say so, and not by NaN: their LSE is compared as a number of its own.
                kernels, references = (torch.where(x == -torch.inf, -1e4, x) for x in (sums, exact_sums))
                compared[f"lse{form}"] = (kernels, references, DISTANCE)
    return compared


def attention_distance(variant: str, device: torch.device, *, fp8_out: bool = False) -> float:
    """Allowed tile distance of attention: in e4m3 a GPU's tensor cores add with fewer bits than float32 has."""
    if variant == "fp8" and device.type == "cuda":
        return ATTENTION_DISTANCE_TENSOR_CORE_E4M3_OUT if fp8_out else ATTENTION_DISTANCE_TENSOR_CORE
    return CODE_DISTANCE if fp8_out else DISTANCE


def _apart(x: torch.Tensor) -> torch.Tensor:
    """The same values with the heads apart, which no descriptor reads."""
    return x.new_empty(*x.shape[:2], 2 * x.shape[2])[..., : x.shape[2]].copy_(x)


def _rounding(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bounded: bool, lse: bool
) -> dict[str, Any]:
    """Where a kernel rounds P: codes differ between steps of 128 and 32 keys, by more than the budget."""
    if backend == "cuda":
        return {"step": BLOCK}
    from happyhorse_fast.ops.triton.block_sparse_attention import launch_config, rounding_of

    return rounding_of(launch_config(q, k, v, bounded=bounded, lse=lse), v)


def _by_descriptors(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bounded: bool) -> bool:
    """Whether the kernel reads tiles through descriptors, which a trace has none of."""
    if backend == "cuda":
        return False
    from happyhorse_fast.ops.triton.block_sparse_attention import launch_config

    return launch_config(q, k, v, bounded=bounded).descriptors


def _check_linear(backend: str, device: torch.device, variant: str) -> Compared:
    compared: Compared = {}
    for name, x, x_scale in _static_and_rows(variant):
        results = []
        for where, how in ((device, backend), (torch.device("cpu"), "reference")):
            weight, w_scale = packed_weight(11, 384, variant, where)
            scale = None if x_scale is None else x_scale.to(where)
            results.append(fp8_linear(x.to(where), scale, weight, w_scale, row_tiles().to(where), backend=how))
        compared[f"y{name}"] = (results[0], results[1], DISTANCE)
    return compared


def _check_residual(backend: str, device: torch.device, variant: str) -> Compared:
    compared: Compared = {}
    for name, x, x_scale in _static_and_rows(variant):
        results = []
        for where, how in ((device, backend), (torch.device("cpu"), "reference")):
            weight, w_scale = packed_weight(12, 384, variant, where)
            hidden = draw(13, ROWS, 384).to(where)
            scale = None if x_scale is None else x_scale.to(where)
            # A tile that the memory adds reaches over the rows behind its end, which are another expert's.
            fp8_linear_residual(x.to(where), scale, weight, w_scale, ragged_tiles().to(where), hidden, backend=how)
            results.append(hidden)
        compared[f"hidden{name}"] = (results[0], results[1], DISTANCE)
    return compared


def _static_and_rows(fmt: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """(form, x, x_scale) of a product's inputs on the CPU: in e4m3 with a scale per row, and with one."""
    x, x_scale = inputs(fmt, torch.device("cpu"))
    yield "", x, x_scale
    if fmt == "fp8" and x_scale is not None:
        one = torch.full((1,), 2**-6)
        yield ", one scale", quantize_static(dequantize(x, x_scale), one), one


def _check_activation(backend: str, device: torch.device, variant: str) -> Compared:
    fmt, out = ACTIVATION[variant]
    fp8 = out == "fp8"
    compared: Compared = {}
    for activation in ("swiglu7", "gelu7"):
        results = []
        for where, how in ((device, backend), (torch.device("cpu"), "reference")):
            x, x_scale = inputs(fmt, where)
            weight, w_scale = packed_weight(14, 512, fmt, where)
            y, y_scale = fp8_linear_activation(
                x, x_scale, weight, w_scale, row_tiles().to(where), activation=activation, fp8=fp8, backend=how
            )
            results.append(dequantize(y, y_scale) if fp8 else y)
        compared[activation] = (results[0], results[1], CODE_DISTANCE if fp8 else DISTANCE)
    return compared


Check = Callable[[str, torch.device, str], Compared]


def _also_by_pointers(check: Check) -> Check:
    """A check that runs what torch.compile takes too: kernels without TMA descriptors, which a trace has none of.

    Where the launch table has no descriptor these are the same kernels, which are not compiled again.
    """

    def both(backend: str, device: torch.device, variant: str) -> Compared:
        compared = check(backend, device, variant)
        if backend == "triton":
            from happyhorse_fast.ops.triton.device import architecture, by_pointers

            if architecture(device) >= DESCRIPTORS_SINCE:
                with by_pointers():
                    again = check(backend, device, variant)
                compared |= {f"{name}, pointers": results for name, results in again.items()}
        return compared

    return both


CHECKS: dict[str, Check] = {
    "rmsnorm_quantize": _check_rmsnorm,
    "quantize_rows": _check_rows,
    "qkv_linear": _also_by_pointers(_check_qkv),
    "select_blocks": check_select,
    "block_sparse_attention": _check_attention,
    "fp8_linear": _also_by_pointers(_check_linear),
    "fp8_linear_residual": _also_by_pointers(_check_residual),
    "fp8_linear_activation": _also_by_pointers(_check_activation),
}
"""A check per op that the fast model calls."""
