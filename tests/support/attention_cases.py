"""What the tests of attention share: inputs in every format, float64 truths, and budgets."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from unittest import mock

import interpreter  # noqa: F401  (exact arithmetic)
import pytest
import torch
from bf16_budget import bf16_violations
from cuda_shim import SHIM
from gluon_emulator import Emulated
from strict import strict

from bench.hopper import HOPPER, running
from happyhorse_fast import budgets
from happyhorse_fast.block_map import BLOCK, BlockMap, Layout
from happyhorse_fast.kernels import launch
from happyhorse_fast.ops import block_sparse_attention
from happyhorse_fast.ops.attention import triton as launcher
from happyhorse_fast.ops.attention.reference import sparse_attention
from happyhorse_fast.ops.attention.score_bound import LIMIT, effective_bound
from happyhorse_fast.ops.quantize import SMALLEST_SCALE, fragment_order, token_order
from happyhorse_fast.ops.runtime.formats import uses_e4m3
from happyhorse_fast.ops.runtime.triton import device

FP8 = torch.float8_e4m3fn
FORMATS = ("bf16", "int8_qk", "int8_qk_fp8_v", "fp8")
FORMS = {
    "triton": FORMATS,
    "triton bounded": ("bf16", "int8_qk"),
    "hopper": FORMATS,
    "cuda": ("bf16",),
    "cuda bounded": ("bf16",),
}
"""Kernel and form of the softmax -> formats: a running maximum unless it says so, but for "hopper", which has the
bounded form alone where v is bf16."""
KERNELS = tuple(FORMS)
RUNS = [(fmt, kernel) for kernel, formats in FORMS.items() for fmt in formats]
CASES = pytest.mark.parametrize(("fmt", "backend"), RUNS)
GLUON_MODULES = (
    "hopper_barriers",
    "hopper_sizes",
    "hopper_ring",
    "hopper_scores",
    "hopper_bounded",
    "hopper_e4m3",
    "attention_hopper",
)
LAYOUT = Layout(3, 77, 29, 40)  # 300 tokens; no boundary on a block
MAP = BlockMap.frame_window(LAYOUT, 0)


def per_block(x, dims=(1, 2)):
    """Scale of every block of 128 tokens of [N, ...], over the given dimensions too: float32."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % BLOCK)).unflatten(0, (-1, BLOCK))
    amax = padded.abs().amax(dim=(1, *(d + 1 for d in dims)))
    return (amax / 448).clamp(min=SMALLEST_SCALE)


def quantised(x, scale):
    each = scale.repeat_interleave(BLOCK, dim=0)[: x.shape[0]].view(x.shape[0], -1, 1)
    return (x / each).clamp(-448, 448).to(FP8)


def in_int8(x, scale):
    """int8 codes of x [N, H, D]; ``scale`` broadcasts."""
    return (x / scale).round().clamp(-127, 127).to(torch.int8)


def with_int8_qk(q, k):
    """q and k as int8 codes and their scales, of float32 [N, Hq, D] and [M, Hkv, D]."""
    amax = q.abs().amax(dim=2)
    q_scale = (amax / 127).clamp(min=SMALLEST_SCALE)
    k_scale = per_block(k, dims=(2,)) * (448 / 127)  # [S, Hkv]
    each = k_scale.repeat_interleave(BLOCK, dim=0)[: len(k), :, None]
    return {
        "q": in_int8(q, q_scale[..., None]),
        "k": in_int8(k, each),
        "q_scale": q_scale,
        "k_scale": k_scale.T.contiguous(),
    }


def with_e4m3_v(v):
    """v as e4m3 codes in fragment order and their scales, of float32 [M, Hkv, D]."""
    v_scale = per_block(v, dims=(2,))  # [S, Hkv]
    codes = quantised(v, v_scale).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, 0, 0, -len(v) % BLOCK)).view(FP8)
    return {"v": fragment_order(codes.permute(1, 2, 0)), "v_scale": v_scale.T.contiguous()}


def inputs(fmt, n=300, heads=(4, 2), d=32, m=None, seed=0, spread=1.0):
    """Keyword arguments of the op: q, k, v and their scales."""
    generator = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    q, k, v = (torch.randn(t, h, d, generator=generator) for t, h in ((n, heads[0]), (m, heads[1]), (m, heads[1])))
    q = q * spread
    if fmt == "fp8":
        q_scale, k_scale = per_block(q), per_block(k)
        given = {"q": quantised(q, q_scale), "k": quantised(k, k_scale), "q_scale": q_scale, "k_scale": k_scale}
    else:
        given = formatted(fmt, q, k, v)
    return given | with_e4m3_v(v) if uses_e4m3(fmt) else given


def formatted(fmt, q, k, v):
    """q, k and v of float32 as keyword arguments of the op, v in bf16."""
    of_qk = {"q": q.bfloat16(), "k": k.bfloat16()} if fmt == "bf16" else with_int8_qk(q, k)
    return of_qk | {"v": v.bfloat16()}


def normed(tokens, heads, d, seed):
    """[tokens, heads, D] in float32, every row of norm 1."""
    x = torch.randn(tokens, heads, d, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=2, keepdim=True)


def values(given):
    """q, k and v as float64, scales multiplied in, v as [M, Hkv, D]."""
    q, k, v = (given[x].double() for x in "qkv")
    if given["q"].dtype == torch.int8:
        q = q * given["q_scale"].double()[..., None]
        k = k * given["k_scale"].double().T.repeat_interleave(BLOCK, dim=0)[: len(k), :, None]
    elif "q_scale" in given:
        q = q * given["q_scale"].double().repeat_interleave(BLOCK)[: len(q), None, None]
        k = k * given["k_scale"].double().repeat_interleave(BLOCK)[: len(k), None, None]
    if "v_scale" in given:
        v = (token_order(v) * given["v_scale"].double().repeat_interleave(BLOCK, dim=1)[:, None]).permute(2, 0, 1)[
            : len(k)
        ]
    return q, k, v


def dense_oracle(given, block_map, scale):
    """(out, LSE) in float64 by one masked softmax over all keys."""
    q, k, v = values(given)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = block_map.to_dense().repeat_interleave(q.shape[1] // block_map.heads, dim=0)
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).nan_to_num(), v), scores.logsumexp(dim=-1)


def bound_of(given, scale):
    """The least bound that norms can promise of the op's inputs, with room for its own rounding."""
    q, k, v = values(given)
    if 0 in (q.numel(), k.numel()):
        return 0.0
    q_norm, k_norm = (x.norm(dim=2).amax(dim=0) for x in (q, k))
    scores = float((q_norm * k_norm.repeat_interleave(q.shape[1] // k.shape[1])).max()) * scale * math.log2(math.e)
    return effective_bound(scores * (1 + 2**-10), float(v.abs().max()))


def rounding_violations(given, block_map, result, scale, gate=None):
    """Where a bounded bf16 or int8_qk result is past what rounding P and the result to bf16 can cost, as sentences.

    With p' = p (1 + d), |d| <= u = 2^-8, and o = sum(p v) / sum(p), the output is off by sum(p d (v - o)) / sum(p'), at
    most u / (1 - u) * sum(p |v - o|) / sum(p); rounding it adds u |o|. 2^-15 is left for float32: a score of 100 has an
    error of 4e-6 in powers of two, its scale and the sums of a few hundred terms the rest.
    """
    q, k, v = values(given)
    group = q.shape[1] // k.shape[1]
    mask = block_map.to_dense().repeat_interleave(q.shape[1] // block_map.heads, dim=0)
    factor = 1.0 if gate is None else gate.double()
    u, single = 2.0**-8, 2.0**-15
    worst = 0.0
    for head in range(q.shape[1]):
        value = v[:, head // group]
        scores = (q[:, head] @ k[:, head // group].T * scale).masked_fill(~mask[head], -torch.inf)
        p = scores.softmax(dim=-1).nan_to_num()
        out = p @ value
        away = torch.einsum("qk,qkd->qd", p, (value - out[:, None]).abs())
        g = 1.0 if gate is None else factor[:, head, None]
        allowed = ((u / (1 - u) + single) * away + (u + single) * out.abs()) * g + 1e-30
        worst = max(worst, float(((result[:, head].double() - out * g).abs() / allowed).nan_to_num(torch.inf).max()))
    return [f"{worst:.2f} of what rounding can cost"] if worst > 1 else []


def eager_bf16(given, block_map, scale):
    """PyTorch's own attention in bf16."""
    q, k, v = (given[x].transpose(0, 1)[None] for x in "qkv")
    mask = block_map.to_dense().repeat_interleave(q.shape[1] // block_map.heads, dim=0)[None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).nan_to_num()


@contextlib.contextmanager
def hopper(seed=1, replace=(), slots=None):
    """On the CPU, Triton's op launches what it would on sm_90 in the Hopper kernel, in the emulator.

    ``slots`` of k, of heads of 32, are the committed ones unless given.
    """
    names = [(f"{fmt}_d32_hopper", launch.HOPPER_ARCH) for fmt in FORMATS if slots is not None]
    rings = {name: dataclasses.replace(launch.config_for(launcher.STEM, *name), num_stages=slots) for name in names}
    kernel = Emulated(GLUON_MODULES, "block_sparse_attention_hopper_kernel", seed, replace)
    stand_ins = {"architecture": lambda _: 90, "block_sparse_attention_hopper_kernel": kernel}
    described = mock.patch.object(device, "addressable", return_value=True)
    with (
        running(HOPPER),
        launch.launched_with(launcher.STEM, rings),
        mock.patch.multiple(launcher, **stand_ins),
        described,
    ):
        yield


def form_of(backend):
    """Whether a kernel of :data:`FORMS` keeps a running maximum, for v in bf16."""
    return "bounded" if backend == "hopper" or backend.endswith(" bounded") else "running"


def rounding(given, backend="triton"):
    """Arguments of `sparse_attention` that put P's rounding where a kernel of :data:`FORMS` has it."""
    bounded = form_of(backend) == "bounded" and given["v"].dtype == torch.bfloat16
    if backend.startswith("cuda"):
        return {"step": BLOCK, "folded": False, "bounded": bounded}
    with hopper() if backend == "hopper" else contextlib.nullcontext():
        config = launcher.launch_config(given["q"], given["k"], given["v"], bounded=bounded)
    return launcher.rounding_of(config, given["v"]) | {"bounded": bounded}


def problems(given, block_map, result, scale, gate=None, backend="triton"):
    """Budget violations of an output, bf16 or fp8 (docs/OPS.md, happyhorse_fast.budgets)."""
    exact, _ = dense_oracle(given, block_map, scale)
    factor = 1.0 if gate is None else gate.double()[..., None]
    if given["q"].dtype == torch.int8 and "v_scale" not in given:
        found = budgets.violations(
            budgets.measure(result, exact * factor), distance=budgets.ATTENTION_DISTANCE_QUANTISED_P
        )
        if form_of(backend) == "bounded":
            found += rounding_violations(given, block_map, result, scale, gate)
        return found
    if "q_scale" not in given:
        eager = (eager_bf16(given, block_map, scale).float() * factor).bfloat16()
        return bf16_violations(budgets.measure(result, exact * factor), budgets.measure(eager, exact * factor))
    ordered, _ = sparse_attention(
        **given,
        block_map=block_map,
        scale=scale,
        gate=gate,
        **rounding(given, backend),
        wide=torch.float64,
        round_out=False,
    )
    found = budgets.violations(
        budgets.measure(result, ordered), distance=budgets.ATTENTION_DISTANCE_QUANTISED_P, slope=budgets.GEMM_SLOPE
    )
    return found + budgets.violations(
        budgets.measure(result, exact * factor), distance=budgets.ATTENTION_DISTANCE_EXACT_P, slope=None
    )


def run(given, block_map, scale=None, backend="triton", **options):
    """The op through a kernel of :data:`FORMS`; ``bound`` is what that form needs unless it is given."""
    scale = given["q"].shape[2] ** -0.5 if scale is None else scale
    bounded = form_of(backend) == "bounded" and given["v"].dtype == torch.bfloat16
    bound = options.pop("bound", bound_of(given, scale) if bounded else math.inf)
    assert not bounded or bound is None or bound <= LIMIT, f"{backend} has no form for scores of up to {bound}"
    called = "triton" if backend == "hopper" else backend.removesuffix(" bounded")
    with strict(seed=1), SHIM.order(2), hopper() if backend == "hopper" else contextlib.nullcontext():
        return block_sparse_attention(**given, block_map=block_map, scale=scale, bound=bound, backend=called, **options)
