"""What the tests of attention share: inputs in every format, float64 truths, and budgets."""

from __future__ import annotations

import contextlib
from unittest import mock

import interpreter  # noqa: F401  (exact arithmetic)
import pytest
import torch
from cuda_shim import SHIM
from gluon_emulator import Emulated
from strict import strict

from bench.specialized import GLUON, running
from happyhorse_fast import budgets
from happyhorse_fast.block_map import BLOCK, BlockMap, Layout
from happyhorse_fast.ops.block_sparse_attention import block_sparse_attention
from happyhorse_fast.ops.triton import block_sparse_attention as launcher
from happyhorse_fast.reference.quantize import fragment_order, token_order
from happyhorse_fast.reference.sparse_attention import sparse_attention

FP8 = torch.float8_e4m3fn
FORMATS = ("bf16", "fp8_qk", "fp8")
KERNELS = ("triton", "specialized", "cuda")
CUDA = ("bf16", "cuda")  # the one format that kernel takes
RUNS = [*((fmt, kernel) for kernel in ("triton", "specialized") for fmt in FORMATS), CUDA]
CASES = pytest.mark.parametrize(("fmt", "backend"), RUNS)
GLUON_MODULES = ("hopper_sizes", "hopper_ring", "block_sparse_attention_hopper")
LAYOUT = Layout(3, 77, 29, 40)  # 300 tokens; no boundary on a block
MAP = BlockMap.frame_window(LAYOUT, 0)


def per_block(x, dims=(1, 2)):
    """Scale of every block of 128 tokens of [N, ...], over the given dimensions too: float32."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % BLOCK)).unflatten(0, (-1, BLOCK))
    amax = padded.abs().amax(dim=(1, *(d + 1 for d in dims)))
    return torch.where(amax > 0, amax / 448, 1.0)


def quantised(x, scale):
    each = scale.repeat_interleave(BLOCK, dim=0)[: x.shape[0]].view(x.shape[0], -1, 1)
    return (x / each).clamp(-448, 448).to(FP8)


def inputs(fmt, n=300, heads=(4, 2), d=32, m=None, seed=0, spread=1.0):
    """Keyword arguments of the op: q, k, v and their scales."""
    generator = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    q, k, v = (torch.randn(t, h, d, generator=generator) for t, h in ((n, heads[0]), (m, heads[1]), (m, heads[1])))
    q = q * spread
    if fmt == "bf16":
        return {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}
    q_scale, k_scale = per_block(q), per_block(k)
    given = {"q": quantised(q, q_scale), "k": quantised(k, k_scale), "v": v.bfloat16()}
    given |= {"q_scale": q_scale, "k_scale": k_scale}
    if fmt == "fp8":
        v_scale = per_block(v, dims=(2,))  # [S, Hkv]
        codes = torch.nn.functional.pad(quantised(v, v_scale).view(torch.uint8), (0, 0, 0, 0, 0, -m % BLOCK)).view(FP8)
        given |= {"v": fragment_order(codes.permute(1, 2, 0)), "v_scale": v_scale.T.contiguous()}
    return given


def values(given):
    """q, k and v as float64, scales multiplied in, v as [M, Hkv, D]."""
    q, k, v = (given[x].double() for x in "qkv")
    if "q_scale" in given:
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


def eager_bf16(given, block_map, scale):
    """PyTorch's own attention in bf16."""
    q, k, v = (given[x].transpose(0, 1)[None] for x in "qkv")
    mask = block_map.to_dense().repeat_interleave(q.shape[1] // block_map.heads, dim=0)[None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).nan_to_num()


@contextlib.contextmanager
def specialized(seed=1, replace=()):
    """On the CPU, Triton's op launches what it would on sm_90 with specialized warps, in the emulator."""
    kernel = Emulated(GLUON_MODULES, "block_sparse_attention_hopper_kernel", seed, replace)
    stand_ins = {
        "block_sparse_attention_hopper_kernel": kernel,
        "architecture": lambda _: 90,
        "addressable": lambda x: type(x) is torch.Tensor,
    }
    with running(GLUON), mock.patch.multiple(launcher, **stand_ins):
        yield


def step_of(given, backend="triton"):
    if backend == "specialized":
        return BLOCK
    return launcher.launch_config(given["q"], given["k"], given["v"]).block_n


def problems(given, block_map, result, scale, gate=None, backend="triton"):
    """Budget violations of an output, bf16 or fp8 (docs/OPS.md, happyhorse_fast.budgets)."""
    exact, _ = dense_oracle(given, block_map, scale)
    factor = 1.0 if gate is None else gate.double()[..., None]
    if "q_scale" not in given:
        eager = (eager_bf16(given, block_map, scale).float() * factor).bfloat16()
        return budgets.bf16_violations(budgets.measure(result, exact * factor), budgets.measure(eager, exact * factor))
    ordered, _, _ = sparse_attention(
        **given,
        block_map=block_map,
        scale=scale,
        gate=gate,
        step=step_of(given, backend),
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
    scale = given["q"].shape[2] ** -0.5 if scale is None else scale
    called = "triton" if backend == "specialized" else backend
    with strict(seed=1), SHIM.order(2), specialized() if backend == "specialized" else contextlib.nullcontext():
        return block_sparse_attention(**given, block_map=block_map, scale=scale, backend=called, **options)
