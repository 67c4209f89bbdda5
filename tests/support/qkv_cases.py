"""Cases, float64 truths and budgets that the tests of the QKV product and its norm share."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from bf16_budget import bf16_violations

from happyhorse_fast import budgets
from happyhorse_fast.eager import qkv as eager
from happyhorse_fast.eager.rotary import apply_rotary
from happyhorse_fast.ops.qkv import op as ops
from happyhorse_fast.ops.qkv import packing
from happyhorse_fast.ops.quantize import dequantize

KERNELS = ("triton", "cuda")
BACKENDS = (*KERNELS, "reference")
NAMES = ("q", "k", "v", "gate")
# Rows per expert (tails of 0, 1 and 127, boundaries off and on the grid of 128), C, D, Hq, Hkv.
SHAPES = {
    "one-tile": ((128,), 160, 32, 2, 1),
    "tail-1-gqa5": ((129,), 256, 64, 5, 1),
    "tail-127-mha": ((127,), 160, 128, 1, 1),
    "experts-off-grid": ((130, 57, 1), 160, 32, 4, 2),
    "d128-gqa5": ((70, 20, 38), 256, 128, 5, 1),
    "many-gates": ((3,), 64, 32, 34, 34),
}
ALIGNED = ("one-tile", "tail-1-gqa5", "tail-127-mha", "experts-aligned", "many-gates")
SHAPES["experts-aligned"] = ((128, 256, 57), 160, 32, 4, 2)


def make(shape, seed=0, codes="fp8"):
    """A case: published and packed weights, inputs in float32 and in codes, e4m3 or int8."""
    rows, c, d, hq, hkv = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=g) * scale

    experts, n = len(rows), sum(rows)
    ends = torch.tensor(rows).cumsum(0).tolist()
    spans = [(e, end - size, end) for e, (size, end) in enumerate(zip(rows, ends, strict=True))]
    tiles = [(e, a, min(a + 128, end)) for e, start, end in spans for a in range(start, end, 128)]
    angles = normal(n, 3 * d // 8, scale=3.0)
    case = SimpleNamespace(
        spans=spans,
        heads=(hq, hkv),
        d=d,
        hidden=normal(n, c) * normal(n, 1).exp(),
        branch=normal(n, c).bfloat16(),
        norm=normal(experts, c, scale=0.2),
        published=normal(experts * ((hq + 2 * hkv) * d + hq), c, scale=c**-0.5).bfloat16(),
        q_norm=normal(experts * d, scale=0.2),
        k_norm=normal(experts * d, scale=0.2),
        phases=torch.cat([angles.sin(), angles.cos()], dim=1),
        row_tiles=torch.tensor(tiles, dtype=torch.int32),
    )
    sizes = {"experts": experts, "num_heads_q": hq, "num_heads_kv": hkv, "head_dim": d}
    case.weight, _ = packing.pack_qkv_weight(case.published, **sizes)
    case.codes, case.weight_scale = packing.pack_qkv_weight(case.published, to=codes, **sizes)
    case.qk_norm = packing.pack_qk_norm(case.q_norm, case.k_norm, experts=experts)
    case.cos_sin = packing.pack_cos_sin(case.phases)
    case.qk_scale = packing.static_qk_scale(case.qk_norm)
    case.x, case.x_scale = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, out=codes, backend="reference")
    return case


def tail(case):
    return case.qk_norm, case.cos_sin, case.row_tiles, *case.heads


def bf16_linear(case, backend="triton"):
    x, scale = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, backend=backend)
    return ops.qkv_linear(x, scale, case.weight, None, *tail(case), "bf16", backend=backend)


def fp8_linear(case, out="bf16", backend="triton", **given):
    arguments = {"x_scale": case.x_scale, "weight": case.codes, "weight_scale": case.weight_scale} | given
    scale = case.qk_scale if out == "fp8" else None
    return ops.qkv_linear(case.x, *arguments.values(), *tail(case), out, scale, backend=backend)


def published(case, dtype):
    """q, k, v, gate of the eager function, channels permuted; float64 is the truth for the bf16 kernels."""
    hidden = case.hidden.to(torch.promote_types(dtype, torch.float32))
    parts = []
    for e, start, end in case.spans:
        weights = (w.chunk(len(case.spans))[e] for w in (case.published, case.q_norm, case.k_norm))
        arguments = (hidden[start:end], case.norm[e], *weights, case.phases[start:end].to(hidden.dtype))
        hq, hkv = case.heads
        parts.append(eager.rmsnorm_qkv(*arguments, num_heads_q=hq, num_heads_kv=hkv, compute_dtype=dtype))
    q, k, v, gate = (torch.cat(p) for p in zip(*parts, strict=True))
    order = packing.rotary_permutation(case.d)
    return q[..., order], k[..., order], v, gate.sigmoid()


def exact(case):
    """q, k, v, gate in float64 from the same quantised inputs."""
    hq, hkv = case.heads
    x, weight = (
        dequantize(case.x, case.x_scale, torch.float64),
        dequantize(case.codes, case.weight_scale, torch.float64),
    )
    back = torch.argsort(packing.rotary_permutation(case.d))
    parts = []
    for e, start, end in case.spans:
        product = (x[start:end] @ weight[e].T).unflatten(1, (-1, case.d))
        q, k, v, gates = product.split([hq, hkv, hkv, product.shape[1] - hq - 2 * hkv], dim=1)
        q, k = (eager.rms_norm(t, case.qk_norm[e, i])[..., back] for i, t in enumerate((q, k)))
        q, k = (apply_rotary(t, case.phases[start:end].double()) for t in (q, k))
        parts.append((q, k, v, gates.flatten(1)[:, :hq].sigmoid()))
    q, k, v, gate = (torch.cat(p) for p in zip(*parts, strict=True))
    order = torch.argsort(back)
    return q[..., order], k[..., order], v, gate


def steps(codes, values):
    """Largest distance of e4m3 codes from the nearest ones to float64 values, in steps of the format."""
    wanted = values.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    ordinals = (t.contiguous().view(torch.int8).int() for t in (codes, wanted))
    a, b = (torch.where(t < 0, -(t & 127), t) for t in ordinals)
    return int((a - b).abs().max())


def bf16_problems(case, result, truth=None):
    truth = published(case, torch.float64) if truth is None else truth
    found = []
    for name, got, want, ref in zip(NAMES, result, truth, published(case, torch.bfloat16), strict=True):
        problems = bf16_violations(budgets.measure(got, want), budgets.measure(ref, want))
        found += [f"{name}: {p}" for p in problems]
    return found


def int8_steps(codes, values):
    """Largest distance of int8 codes from the nearest ones to float64 values."""
    return int((codes.int() - values.round().clamp(-127, 127).int()).abs().max())


def fp8_problems(result, truth):
    return [
        f"{name}: {problem}"
        for name, got, want in zip(NAMES, result, truth, strict=True)
        for problem in budgets.violations(budgets.measure(got, want))
    ]


def without_scale(result):
    q, k, v, *_, gate = result
    return q, k, v, gate
