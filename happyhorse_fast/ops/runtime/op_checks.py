"""A check per op that the fast model calls: small shapes on a device, beside the reference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector, Layout
from happyhorse_fast.budgets import ATTENTION_DISTANCE_TENSOR_CORE, ATTENTION_DISTANCE_TENSOR_CORE_E4M3_OUT
from happyhorse_fast.kernels.launch import DESCRIPTORS_SINCE, HOPPER_ARCH
from happyhorse_fast.ops.attention.op import block_sparse_attention
from happyhorse_fast.ops.attention.reference import output_scale, sparse_attention
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.ops.block_selection.op import select_blocks
from happyhorse_fast.ops.linear.op import fp8_linear, fp8_linear_activation, fp8_linear_residual
from happyhorse_fast.ops.linear.packing import pack_linear
from happyhorse_fast.ops.qkv.op import qkv_linear, rmsnorm_quantize
from happyhorse_fast.ops.qkv.packing import pack_cos_sin, pack_qk_norm, pack_qkv_weight, static_qk_scale
from happyhorse_fast.ops.qkv.reference import quantize_k, quantize_v
from happyhorse_fast.ops.quantize import (
    ATTENTION,
    BF16,
    E4M3,
    INT8,
    dequantize,
    int8_rows,
    quantize_static,
    to_e4m3,
    token_order,
)
from happyhorse_fast.ops.row_quantization.op import quantize_rows
from happyhorse_fast.ops.runtime.formats import ACTIVATION, QKV
from happyhorse_fast.ops.runtime.triton import device as launchers

# Kernel and reference share every rounding point, so they differ by rounding flips: a bf16 step on every element is
# 8e-6, an e4m3 step on one code in fifty 1e-4.
DISTANCE = 1e-5
CODE_DISTANCE = 1e-4
# Three experts, the last tile of each ragged in its content but not in its rows, as the fast model lays them out.
ROWS, CHANNELS, HEADS_Q, HEADS_KV, HEAD_DIM = 512, 640, 5, 1, 128
SMALLER_HEAD_DIM = 64

Compared = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""Name of a result -> (from the kernel, from the reference, allowed tile distance)."""


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal float32, the same in every process."""
    return torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))


def row_tiles() -> torch.Tensor:
    """[4, 3] int32: three experts, of 256, 128 and 128 rows."""
    return torch.tensor([(0, 0, 128), (0, 128, 256), (1, 256, 384), (2, 384, ROWS)], dtype=torch.int32)


def ragged_tiles() -> torch.Tensor:
    """[5, 3] int32: three experts, of 200, 57 and 255 rows, two of which end in a tile that others' rows follow."""
    spans = [(0, 0, 128), (0, 128, 200), (1, 200, 257), (2, 257, 385), (2, 385, ROWS)]
    return torch.tensor(spans, dtype=torch.int32)


def inputs(fmt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x, scale) of a product in a format: normalised rows; no scale in bf16."""
    norm = torch.zeros(3, CHANNELS, dtype=torch.float32)
    x, scale = rmsnorm_quantize(draw(0, ROWS, CHANNELS), norm, row_tiles(), out=fmt, backend="reference")
    return x, None if fmt == "bf16" else scale


def packed_weight(seed: int, features: int, fmt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, scale) of three experts in a format."""
    # A factor per expert, so that one expert's scale used for all shows.
    experts = torch.tensor([1.0, 3.0, 0.3], dtype=torch.float32).repeat_interleave(features)[:, None]
    weight = (draw(seed, 3 * features, CHANNELS) * experts / CHANNELS**0.5).bfloat16()
    return pack_linear(weight, 3, fmt)


def _both(backend: str, device: torch.device, op: Callable[..., Any], *given: Any, **options: Any) -> tuple[Any, Any]:
    """(results of ``backend`` on a device, of the reference on the CPU), each of tensors of its own."""

    def run(where: torch.device, how: str) -> Any:
        there, named = tree_map_only(torch.Tensor, lambda x: x.to(where, copy=True), (given, options))
        return op(*there, **named, backend=how)

    return run(device, backend), run(torch.device("cpu"), "reference")


def _check_rmsnorm(backend: str, device: torch.device, variant: str) -> Compared:
    def normed(hidden: torch.Tensor, *given: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, scale = rmsnorm_quantize(hidden, *given, **options)
        return hidden, x if variant == "bf16" else x.float() * scale[:, None]

    norm, added = 0.2 * draw(1, 3, CHANNELS), draw(2, ROWS, CHANNELS).bfloat16()
    compared: Compared = {}
    # A kernel each; the model's residual stream has its branches added by the product before.
    for name, branch in (("", None), (", branch", added)):
        given = draw(0, ROWS, CHANNELS), norm, row_tiles(), branch, variant
        (hidden, x), (hidden_reference, x_reference) = _both(backend, device, normed, *given)
        compared[f"hidden{name}"] = (hidden, hidden_reference, DISTANCE)
        compared[f"x{name}"] = (x, x_reference, CODE_DISTANCE if variant == "fp8" else DISTANCE)
    return compared


def _check_rows(backend: str, device: torch.device, variant: str) -> Compared:
    compared: Compared = {}
    # Of the 15B model's widths the one that fills its registers least evenly.
    for rows, channels, hadamard in ((ROWS, CHANNELS, False), (ROWS, CHANNELS, True), (8, 13696, True)):
        x = (draw(18, rows, channels) * draw(19, rows, 1).exp()).bfloat16()
        results = _both(backend, device, quantize_rows, x, hadamard)
        kernel, reference = (codes.float() * scale[:, None] for codes, scale in results)
        compared[f"{channels} channels{', Hadamard' if hadamard else ''}"] = (kernel, reference, DISTANCE)
    return compared


def _check_qkv(backend: str, device: torch.device, variant: str) -> Compared:
    compared = _qkv_of(backend, device, variant, HEAD_DIM)
    if _described_on_hopper(backend, device):
        # Heads of 128 run in Hopper's kernel there, smaller ones in the plain one with descriptors.
        smaller = _qkv_of(backend, device, variant, SMALLER_HEAD_DIM)
        compared |= {f"{name}, heads of {SMALLER_HEAD_DIM}": results for name, results in smaller.items()}
    return compared


def _described_on_hopper(backend: str, device: torch.device) -> bool:
    """Whether products may run in Hopper's kernels: in Triton, on Hopper, and where tiles are described."""
    described = launchers.addressable(torch.empty(0, device=device))
    return backend == "triton" and described and launchers.architecture(device) == HOPPER_ARCH


def _qkv_of(backend: str, device: torch.device, variant: str, head_dim: int) -> Compared:
    fmt, out = QKV[variant]
    rows = 3 * ((HEADS_Q + 2 * HEADS_KV) * head_dim + HEADS_Q)
    weight = (draw(3, rows, CHANNELS) / CHANNELS**0.5).bfloat16()
    heads = {"experts": 3, "num_heads_q": HEADS_Q, "num_heads_kv": HEADS_KV, "head_dim": head_dim}
    packed, w_scale = pack_qkv_weight(weight, to=fmt, **heads)
    qk_norm = pack_qk_norm(0.2 * draw(4, 3 * head_dim), 0.2 * draw(5, 3 * head_dim), experts=3)
    angle = draw(6, ROWS, 3 * head_dim // 8)
    cos_sin = pack_cos_sin(torch.cat([angle.sin(), angle.cos()], dim=1))
    qk_scale = static_qk_scale(qk_norm) if out == "fp8" else None
    operands = *inputs(fmt), packed, w_scale, qk_norm, cos_sin, row_tiles()
    results = []
    for outs in _both(backend, device, qkv_linear, *operands, HEADS_Q, HEADS_KV, out, qk_scale):
        q, k, v, q_scale, k_scale, v_scale, gate = (t.cpu().float() for t in outs)
        if outs[0].dtype == INT8:
            q, k = q * q_scale[:, :, None], k * k_scale.repeat_interleave(128, dim=1).T[:, :, None]
        if outs[2].dtype == E4M3:
            v = (v * v_scale.repeat_interleave(128, dim=1)[:, None]).permute(2, 0, 1)  # as the others: tokens first
        results.append({"q": q, "k": k, "v": v, "gate": gate[:, :, None]})
    codes = {name for name, x in zip("qkv", outs, strict=False) if x.dtype != BF16}
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
    given |= _attention_operands(variant.removesuffix("_fp8_out"), q, k, v)
    # Forms of the softmax -> (bound, whether it is the bounded one, factor of q). Norms of these are at most 40; where
    # no bound is given, both forms are launched, and what the device finds lets one compute.
    softmax: dict[str, tuple[float | None, bool, float]] = {", running": (math.inf, False, 1.0)}
    fp8_v = "v_scale" in given
    if fp8_v:
        softmax = {"": (math.inf, False, 1.0)}
    else:
        softmax |= {", bounded": (LIMIT, True, 1.0)}
    if variant == "bf16":
        softmax |= {", found small": (None, True, 1.0), ", found large": (None, False, 30.0)}
    # A kernel may be launched in another way for an LSE; the model asks for none, and beside products in fp8 for e4m3
    # out.
    plain, to_fp8, with_lse = (False, False), (True, False), (False, True)
    results_of = (to_fp8,) if variant.endswith("_fp8_out") else (plain, with_lse)
    if fp8_v:
        results_of = (*results_of, to_fp8)
    compared: Compared = {}
    for form, (bound, bounded, factor) in softmax.items():
        inputs = given | ({"q": given["q"] * factor} if factor != 1 else {})
        there: dict[str, Any] = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        wanted = [(*result, False) for result in results_of]
        if bound is not None and _launched(backend, there, bounded=bounded)[1]:
            # Strided tensors take another kernel, which reads through pointers.
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
            options, _ = _launched(backend, operands, bounded=bounded, lse=lse)
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


def _attention_operands(fmt: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """q, k and v of float32 in a format of attention; e4m3's scales of q and k differ from block to block."""
    if fmt == "bf16":
        return {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}
    if fmt == "fp8":
        ends = ((0.005, 0.01), (0.01, 0.006))
        q_scale, k_scale = (torch.linspace(*pair, ROWS // BLOCK, dtype=torch.float32) for pair in ends)
        q, k = (to_e4m3(x / s.repeat_interleave(BLOCK)[:, None, None]) for x, s in ((q, q_scale), (k, k_scale)))
    else:
        (q, q_scale), (k, k_scale) = int8_rows(q), quantize_k(k)
    given = {"q": q, "k": k, "q_scale": q_scale, "k_scale": k_scale.contiguous()}
    if ATTENTION[fmt][1] == BF16:
        return given | {"v": v.bfloat16()}
    codes, v_scale = quantize_v(v.bfloat16().float())
    return given | {"v": token_order(codes).contiguous(), "v_scale": v_scale.contiguous()}


def attention_distance(variant: str, device: torch.device, *, fp8_out: bool = False) -> float:
    """Allowed tile distance of attention: in e4m3 a GPU's tensor cores add scores with fewer bits than float32 has."""
    if variant == "fp8" and device.type == "cuda":
        return ATTENTION_DISTANCE_TENSOR_CORE_E4M3_OUT if fp8_out else ATTENTION_DISTANCE_TENSOR_CORE
    return CODE_DISTANCE if fp8_out else DISTANCE


def _apart(x: torch.Tensor) -> torch.Tensor:
    """The same values with the heads apart, which no descriptor reads."""
    return x.new_empty(*x.shape[:2], 2 * x.shape[2])[..., : x.shape[2]].copy_(x)


def _launched(backend: str, given: dict[str, Any], *, bounded: bool, lse: bool = False) -> tuple[dict[str, Any], bool]:
    """Where a kernel rounds P, as the reference takes it, and whether it reads tiles through descriptors.

    Codes of P differ between steps of 128 and 32 keys by more than the budget.
    """
    if backend == "cuda":
        return {"step": BLOCK}, False
    from happyhorse_fast.ops.attention.triton import launch_config, rounding_of

    config = launch_config(given["q"], given["k"], given["v"], bounded=bounded, lse=lse)
    return rounding_of(config, given["v"]), config.descriptors


def _check_select(backend: str, device: torch.device, variant: str) -> Compared:
    """Maps of a backend on a device, q and k in a format, beside the reference's; nothing may differ."""
    # Small integers, whose scores are the same in any order of summation, and tie: the map must be the same exactly.
    layout = Layout(4, 250, 40, 60, align_frames=True, align_modalities=True)
    base = BlockMap.frame_window(layout, 2)
    q, k = (draw(s, layout.slots, h, HEAD_DIM).round() for s, h in ((15, HEADS_Q), (16, HEADS_KV)))
    # Blocks that differ by at most 2, so that the largest product, (2 * 128)^2 * 128, and its noise stay below 2^24.
    level = draw(17, len(q) // 128, 1, 1).round().clamp(-2, 2).repeat_interleave(128, dim=0)
    dtype, _ = ATTENTION[variant]
    q, k = ((x + level).to(dtype) for x in (q, k))
    # Powers of two, so that sums are exact in any order.
    steps = 2.0 ** -(torch.arange(len(q) // 128) % 3).float()
    scales: dict[str, Any] = {"q_scale": steps, "k_scale": steps.flip(0)} if variant == "fp8" else {}
    if variant == "int8_qk":
        rows = 2.0 ** -(torch.arange(len(q) * HEADS_Q) % 3).float().view(-1, HEADS_Q)
        scales = {"q_scale": rows, "k_scale": steps.expand(HEADS_KV, -1).contiguous()}

    def chosen(q: torch.Tensor, k: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        block_map = select_blocks(q, k, BlockSelector(layout, base, q.device), **options)
        full, ids = block_map.to_blocks()
        return torch.where(full, -1, torch.where(ids >= 0, ids, -2)), block_map.order

    compared: Compared = {}
    for name, amount in (("top-k", {"keep": 3}), ("top-p", {"mass": 0.7})):
        (blocks, order), (blocks_reference, order_reference) = _both(backend, device, chosen, q, k, **amount, **scales)
        compared[f"{name} blocks"] = (blocks, blocks_reference, 0.0)
        compared[f"{name} order"] = (order, order_reference, 0.0)
    return compared


def _check_linear(backend: str, device: torch.device, variant: str) -> Compared:
    operands = *packed_weight(11, 384, variant), row_tiles()
    return {
        f"y{name}": (*_both(backend, device, fp8_linear, *x, *operands), DISTANCE)
        for name, x in _static_and_rows(variant)
    }


def _check_residual(backend: str, device: torch.device, variant: str) -> Compared:
    def added(*given: Any, **options: Any) -> Any:
        fp8_linear_residual(*given, **options)
        return given[-1]

    # A tile that the memory adds reaches over the rows behind its end, which are another expert's.
    operands = *packed_weight(12, 384, variant), ragged_tiles(), draw(13, ROWS, 384)
    return {
        f"hidden{name}": (*_both(backend, device, added, *x, *operands), DISTANCE)
        for name, x in _static_and_rows(variant)
    }


def _static_and_rows(fmt: str) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor | None]]]:
    """(form, (x, x_scale)) of a product's inputs: in e4m3 with a scale per row, and with one."""
    x, x_scale = inputs(fmt)
    yield "", (x, x_scale)
    if fmt == "fp8" and x_scale is not None:
        one = torch.full((1,), 2**-6)
        yield ", one scale", (quantize_static(dequantize(x, x_scale), one), one)


def _check_activation(backend: str, device: torch.device, variant: str) -> Compared:
    fmt, out = ACTIVATION[variant]
    fp8 = out == "fp8"
    compared: Compared = {}
    for activation in ("swiglu7", "gelu7"):
        operands = *inputs(fmt), *packed_weight(14, 512, fmt), row_tiles()
        results = _both(backend, device, fp8_linear_activation, *operands, activation, fp8)
        kernel, reference = (dequantize(y, y_scale) if fp8 else y for y, y_scale in results)
        compared[activation] = (kernel, reference, CODE_DISTANCE if fp8 else DISTANCE)
    return compared


Check = Callable[[str, torch.device, str], Compared]


def _in_every_launch(check: Check) -> Check:
    """A check of a product, repeated as other tensors and shapes would have it launched.

    Through pointers, as tensors that are not aligned take: where the launch table has no descriptor these are the same
    kernels, which are not compiled again. And on Hopper in a few programs: on the 132 multiprocessors of an H100 these
    shapes give no program a second tile, before which roles await each other. No kernel is compiled for a grid.
    """

    def every(backend: str, device: torch.device, variant: str) -> Compared:
        compared = check(backend, device, variant)
        if backend == "triton":
            arch, launches = launchers.architecture(device), {}
            if arch >= DESCRIPTORS_SINCE:
                launches["pointers"] = launchers.by_pointers
            if arch == HOPPER_ARCH:
                launches["few programs"] = launchers.few_programs
            for name, launched in launches.items():
                with launched():
                    again = check(backend, device, variant)
                compared |= {f"{result}, {name}": results for result, results in again.items()}
        return compared

    return every


CHECKS: dict[str, Check] = {
    "rmsnorm_quantize": _check_rmsnorm,
    "quantize_rows": _check_rows,
    "qkv_linear": _in_every_launch(_check_qkv),
    "select_blocks": _check_select,
    "block_sparse_attention": _check_attention,
    "fp8_linear": _in_every_launch(_check_linear),
    "fp8_linear_residual": _in_every_launch(_check_residual),
    "fp8_linear_activation": _in_every_launch(_check_activation),
}
"""A check per op that the fast model calls."""
