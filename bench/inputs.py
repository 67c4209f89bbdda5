"""Seeded inputs of a case, made on the device they are used on, and the call of its op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.cases import BLOCK_SPARSE, DROP_IN, Case, exact_map, padded_rows
from bench.hopper import running
from happyhorse_fast import ops
from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector
from happyhorse_fast.eager.qkv import rms_norm
from happyhorse_fast.ops.attention import sdpa
from happyhorse_fast.ops.attention.score_bound import LIMIT, norm_bound, scores_fit
from happyhorse_fast.ops.block_selection.contract import empty_results
from happyhorse_fast.ops.qkv.packing import static_qk_scale
from happyhorse_fast.ops.qkv.reference import quantize_k
from happyhorse_fast.ops.quantize import int8_rows
from happyhorse_fast.ops.runtime.formats import uses_e4m3

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
Given = dict[str, Any]
"""Keyword arguments of an op, without the backend."""

# Codes spread over the format, as a scale per row makes them: one in 16,000 of a normal distribution is clamped.
CODE_SPREAD = {"fp8": 448 / 4, "int8": 127 / 4}
BOUNDED, RUNNING, FOUND = "bounded", "running maximum", ", found on the device"
"""Forms of attention's softmax, as results name them."""


class Draw:
    """Standard normal tensors on a device; on ``"meta"`` shapes alone."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        self.small = torch.Generator().manual_seed(seed)

    def norms(self, *shape: int) -> Tensor:
        """Weights of norms, N(0, 0.2^2), on the CPU: with data whatever the device."""
        return torch.randn(shape, generator=self.small).mul_(0.2)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """N(0, scale^2)."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype).mul_(scale)

    def codes(self, *shape: int, fmt: str = "fp8") -> Tensor:
        """e4m3 or int8 codes of N(0, CODE_SPREAD^2)."""
        values = self.normal(*shape, scale=CODE_SPREAD[fmt], dtype=BF16)
        return values.round_().clamp_(-127, 127).to(torch.int8) if fmt == "int8" else values.clamp_(-448, 448).to(E4M3)

    def scales(self, *shape: int, size: float = 1.0, fmt: str = "fp8") -> Tensor:
        """float32 scales, each different, that make codes values of about ``size``."""
        spread = torch.rand(shape, generator=self.generator, device=self.device)
        return (spread + 0.5) * (size / CODE_SPREAD[fmt])


def make(case: Case, device: torch.device | str, seed: int = 0) -> Given:
    """Inputs of a case; on ``"meta"`` without data."""
    draw = Draw(torch.device(device), seed)
    return _MAKERS[case.op](case, draw)


def _rmsnorm(case: Case, draw: Draw) -> Given:
    channels = case.size.config.hidden_size
    return {
        "hidden": draw.normal(case.rows, channels),
        "norm_weight": draw.normal(case.plan.experts, channels, scale=0.2),
        "row_tiles": _row_tiles(case, draw),
        "out": case.precision,
    }


def _rows(case: Case, draw: Draw) -> Given:
    x = draw.normal(case.rows, case.weight_shape(case.part)[2], dtype=BF16)
    return {"x": x, "hadamard": case.part == "down"}


def _qkv(case: Case, draw: Draw) -> Given:
    plan = case.plan
    qk_norm = draw.normal(plan.experts, 2, plan.head_dim, scale=0.2)
    angle = draw.normal(case.rows, plan.head_dim // 2)
    return {
        **_operands(case, draw, "qkv"),
        "qk_norm": qk_norm,
        "cos_sin": torch.cat([angle.cos(), angle.sin()], dim=1),
        "row_tiles": _row_tiles(case, draw),
        "num_heads_q": plan.num_heads_q,
        "num_heads_kv": plan.num_heads_kv,
        "out": "int8_qk" if case.precision == "int8" else case.precision,
        "qk_scale": static_qk_scale(qk_norm) if case.precision == "fp8" else None,
    }


def _attention(case: Case, draw: Draw) -> Given:
    plan, rows = case.plan, case.rows
    operands, bound = _queries_and_keys(case, draw)
    given: Given = {"scale": plan.head_dim**-0.5, **operands}
    if case.op == BLOCK_SPARSE:
        given["gate"] = draw.normal(rows, plan.num_heads_q).sigmoid_()
    if uses_e4m3(case.precision):
        given["v"] = draw.codes(plan.num_heads_kv, plan.head_dim, rows)
        given |= {"v_scale": draw.scales(plan.num_heads_kv, rows // BLOCK), "fp8_out": True}
    else:
        given["v"] = draw.normal(rows, plan.num_heads_kv, plan.head_dim, dtype=BF16)
        given |= {"bound": bound} if case.op == BLOCK_SPARSE else {}
    given["block_map"] = block_map(case, given)
    return given


def _queries_and_keys(case: Case, draw: Draw) -> tuple[Given, float]:
    """(q, k and their scales; a bound on their scores): normalised per head as a layer's are, but for codes of e4m3."""
    plan, rows = case.plan, case.rows
    shapes = ((rows, plan.num_heads_q, plan.head_dim), (rows, plan.num_heads_kv, plan.head_dim))
    if case.precision == "fp8":
        codes = {name: draw.codes(*shape) for name, shape in zip("qk", shapes, strict=True)}
        scales = {f"{name}_scale": draw.scales(rows // BLOCK) for name in "qk"}
        return {**codes, **scales}, float("inf")
    norms = draw.norms(2, plan.head_dim)
    q, k = (rms_norm(draw.normal(*shape), norm.to(draw.device)) for shape, norm in zip(shapes, norms, strict=True))
    bound = norm_bound(*norms)
    if case.precision == "bf16":
        return {"q": q.to(BF16), "k": k.to(BF16)}, bound
    (q, q_scale), (k, k_scale) = int8_rows(q), quantize_k(k)
    return {"q": q, "k": k, "q_scale": q_scale, "k_scale": k_scale.contiguous()}, bound


def softmax(given: Given) -> str | None:
    """The form of attention's softmax that these inputs lead to; None for other ops. Waits for the device."""
    if "v" not in given:
        return None
    if "v_scale" in given:
        return RUNNING
    if "bound" in given:
        return BOUNDED if given["bound"] <= LIMIT else RUNNING
    small = bool(scores_fit(given["q"], given["k"], given["v"], given["scale"]))
    return f"{BOUNDED if small else RUNNING}{FOUND}"


def block_map(case: Case, given: Mapping[str, Any]) -> BlockMap:
    """The map of an attention case, on the device of its q; sparse ones by torch, whatever the backend under test."""
    device = given["q"].device
    if case.keep is None:
        return exact_map(case.size, case.part == "window").to(device)
    chooser = selector(case, device)
    if device.type == "meta":
        return chooser.base.within(empty_results(given["k"], chooser.table))
    scales: dict[str, Any] = {name: given.get(name) for name in ("q_scale", "k_scale")}
    return ops.select_blocks(given["q"], given["k"], chooser, keep=case.keep, **scales, backend="reference")


def selector(case: Case, device: torch.device) -> BlockSelector:
    """Make what chooses a case's blocks."""
    return BlockSelector(padded_rows(case.size), exact_map(case.size, False), "cpu").to(device)


def _select(case: Case, draw: Draw) -> Given:
    given, _ = _queries_and_keys(case, draw)
    return given | {"selector": selector(case, draw.device), "keep": case.keep}


def _residual(case: Case, draw: Draw) -> Given:
    given = _operands(case, draw, case.part) | {"row_tiles": _row_tiles(case, draw)}
    if case.precision == "fp8":
        given["x_scale"] = draw.scales(1)  # as attention and an activation write it
    return given | {"hidden": draw.normal(case.rows, case.weight_shape(case.part)[1])}


def _activation(case: Case, draw: Draw) -> Given:
    given = _operands(case, draw, "up") | {"row_tiles": _row_tiles(case, draw)}
    return given | {"activation": case.part, "fp8": case.precision == "fp8"}


def _operands(case: Case, draw: Draw, name: str) -> Given:
    experts, features, inputs = case.weight_shape(name)
    if case.precision == "bf16":
        x = draw.normal(case.rows, inputs, dtype=BF16)
        weight = draw.normal(experts, features, inputs, scale=inputs**-0.5, dtype=BF16)
        return {"x": x, "x_scale": None, "weight": weight, "weight_scale": None}
    fmt = case.precision
    return {
        "x": draw.codes(case.rows, inputs, fmt=fmt),
        "x_scale": draw.scales(case.rows, fmt=fmt),
        "weight": draw.codes(experts, features, inputs, fmt=fmt),
        "weight_scale": draw.scales(experts, features, size=inputs**-0.5, fmt=fmt),
    }


def _row_tiles(case: Case, draw: Draw) -> Tensor:
    return padded_rows(case.size).row_tiles(case.plan.experts, device=draw.device)


def _drop_in(q: Tensor, k: Tensor, v: Tensor, *, backend: str, **options: Any) -> tuple[Tensor]:
    """`attention` as any model calls it, on [1, heads, tokens, D] views of what a layer has."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = sdpa.attention(q, k, v, backend=backend, **options)
    assert isinstance(out, Tensor)
    return (out[0].transpose(0, 1),)


_MAKERS = {
    BLOCK_SPARSE: _attention,
    DROP_IN: _attention,
    "fp8_linear_activation": _activation,
    "fp8_linear_residual": _residual,
    "qkv_linear": _qkv,
    "quantize_rows": _rows,
    "rmsnorm_quantize": _rmsnorm,
    "select_blocks": _select,
}


def call(case: Case, given: Given, backend: str) -> tuple[Tensor, ...]:
    """Run the op; its results as a tuple, the changed residual stream for the op that writes there."""
    op = _drop_in if case.op == DROP_IN else getattr(ops, case.op)
    with running(backend) as name:
        result = op(**given, backend=name)
    if result is None:
        return (given["hidden"],)
    if isinstance(result, BlockMap):
        counts, starts, columns, mask_ids, _, order = result.tensors()  # the masks are its base's
        return counts, starts, columns, mask_ids, order
    return tuple(result)


def moved_bytes(case: Case) -> int:
    """Bytes that the op must move: every input read once, every output written once; block maps are left out."""
    given = make(case, "meta")
    results = call(case, given, "reference")
    return sum(t.nbytes for t in (*given.values(), *results) if isinstance(t, Tensor))
