"""Every committed launch configuration of the GPU's architecture, run and compared with the reference."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, DRY, MARKS

from bench.hopper import ENTRIES, HOPPER, running
from bench.measure.gates import poisoned
from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.budgets import measure, violations
from happyhorse_fast.kernels.launch import HOPPER_ARCH, config_for, table
from happyhorse_fast.ops import block_sparse_attention, fp8_linear, fp8_linear_activation, fp8_linear_residual
from happyhorse_fast.ops.attention import triton as launcher
from happyhorse_fast.ops.attention.reference import sparse_attention
from happyhorse_fast.ops.quantize import ATTENTION as FORMATS
from happyhorse_fast.ops.quantize import E4M3_MAX, code_scale, e4m3_rows, int8_rows, quantize_static
from happyhorse_fast.ops.runtime.formats import uses_e4m3
from happyhorse_fast.ops.runtime.op_checks import attention_distance
from happyhorse_fast.ops.runtime.triton.device import architecture

pytestmark = MARKS
E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")
# A bf16 step on every element is 8e-6, an e4m3 step on one code in fifty 1e-4.
DISTANCE = 2e-5
LINEAR = sorted(table("linear"))
ATTENTION = sorted(table("attention"))
FORM = re.compile("_(strided|hopper)$")
# QKV product and norm have one configuration per format, and the choice of blocks one per kernel: test_gpu_ops.py
# runs them all.
ELSEWHERE = {"qkv": {"rmsnorm_quantize", "qkv_bf16", "qkv_int8", "qkv_fp8"}}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_configuration_is_run_by_some_test() -> None:
    assert set(table("qkv")) == ELSEWHERE["qkv"]
    formats = {FORM.sub("", v).rpartition("_d")[0] for v in ATTENTION}
    assert formats == set(FORMATS)
    assert {v.rpartition("_")[2] for v in LINEAR} == {"plain", "residual", "swiglu7", "gelu7"}


@pytest.mark.parametrize(
    ("variant", "impl"),
    [("bf16_plain", "triton"), ("fp8_residual", "triton")]
    if DRY
    else [(v, "triton") for v in LINEAR] + [(v, HOPPER) for v in ENTRIES["linear"]],
)
def test_linear(variant: str, impl: str) -> None:
    if impl == HOPPER and architecture(DEVICE) != HOPPER_ARCH:
        pytest.skip(f"needs sm_{HOPPER_ARCH}")
    precision, epilogue = variant.split("_")
    rows, features, inputs = (128, 128, 128) if DRY else (640, 768, 1024)
    x, weight = draw(0, rows, inputs), draw(1, 2, features, inputs) / inputs**0.5
    x_scale = weight_scale = None
    if precision == "bf16":
        x, weight = x.bfloat16(), weight.bfloat16()
    elif precision == "int8":
        (x, x_scale), (weight, weight_scale) = int8_rows(x), int8_rows(weight)
    else:
        if epilogue == "residual":
            x_scale = code_scale(x.abs().amax(), E4M3_MAX).reshape(1)
            x = quantize_static(x, x_scale)
        else:
            x, x_scale = e4m3_rows(x)
        weight, weight_scale = e4m3_rows(weight)
    starts = torch.arange(0, rows, 128, dtype=torch.int32)
    tiles = torch.stack([(starts >= rows // 2).to(torch.int32), starts, starts + 128], dim=1)
    arguments = (x, x_scale, weight, weight_scale, tiles)
    results = []
    for device, backend in ((DEVICE, "triton"), (CPU, "reference")):
        moved = [None if t is None else t.to(device) for t in arguments]
        with poisoned(), running(impl):
            results.append(linear(moved, epilogue, draw(2, rows, features).to(device), backend))
    error = measure(results[0].cpu(), results[1])
    assert violations(error, distance=DISTANCE, slope=None) == []


def linear(moved: list[Any], epilogue: str, hidden: torch.Tensor, backend: str) -> torch.Tensor:
    if epilogue == "plain":
        return fp8_linear(*moved, backend=backend)
    if epilogue == "residual":
        fp8_linear_residual(*moved, hidden, backend=backend)
        return hidden
    return fp8_linear_activation(*moved, epilogue, False, backend=backend)[0]


def forms(variant: str) -> tuple[bool, ...]:
    """Of the softmax that a configuration has: bounded or not."""
    if uses_e4m3(variant):
        return (False,)
    return (True,) if variant.endswith("_hopper") else (False, True)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(
    ("variant", "bounded"),
    [
        (v, b)
        for v in (("bf16_d32", "int8_qk_d64_strided", "int8_qk_fp8_v_d32") if DRY else ATTENTION)
        for b in forms(v)
    ],
)
def test_attention(variant: str, bounded: bool, lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = architecture(DEVICE)
    if str(arch) in table("attention")[variant]:
        # By its name, not as the launcher picks it: some it takes for an LSE alone, some only without.
        config = config_for("attention", variant, arch)
        config = dataclasses.replace(config, hopper=variant.endswith("_hopper"))
        monkeypatch.setattr(launcher, "launch_config", lambda *_, **__: config)
    elif not DRY:
        pytest.skip(f"no entry for sm_{arch}")
    strided = variant.endswith("_strided")
    fmt, _, head_dim = FORM.sub("", variant).rpartition("_d")
    d, rows = int(head_dim), 256 if DRY else 1024
    heads = {"q": 4, "k": 2, "v": 2}
    # Views of one buffer with two unused channels per head: rows that no descriptor can read.
    wide = {name: draw(i, rows, n, d + 8) for i, (name, n) in enumerate(heads.items())}
    values: dict[str, Any] = {name: (x if strided else x[..., :d].contiguous()) for name, x in wide.items()}
    blocks = rows // 128
    given: dict[str, Any] = {name: x.bfloat16() for name, x in values.items()}
    of_qk, of_v = FORMATS[fmt]
    if of_qk == torch.int8:
        given |= {name: (values[name] * 30).round().clamp(-127, 127).to(torch.int8) for name in "qk"}
        given["q_scale"] = torch.linspace(0.02, 0.04, rows * heads["q"]).view(rows, -1)
        given["k_scale"] = torch.linspace(0.02, 0.04, heads["k"] * blocks).view(-1, blocks)
    elif of_qk == E4M3:
        given |= {name: (values[name] * 50).clamp(-448, 448).to(E4M3) for name in "qk"}
        given |= {"q_scale": torch.full((blocks,), 0.01), "k_scale": torch.linspace(0.01, 0.02, blocks)}
    if of_v == E4M3:
        given["v"] = (draw(5, 2, d, rows) * 50).clamp(-448, 448).to(E4M3)
        given["v_scale"] = torch.linspace(0.01, 0.02, 2 * blocks).view(2, blocks)
    block_map = BlockMap.from_ranges([(0, rows // 2), (rows // 2, rows)], [(0, rows - 50), (60, rows)], rows, rows)
    there = {name: x.to(DEVICE) for name, x in given.items()}
    if strided:
        views = {name for name in "qkv" if not (of_v == E4M3 and name == "v")}
        there, given = ({n: x[..., :d] if n in views else x for n, x in both.items()} for both in (there, given))
    with poisoned():
        out, _, sums = block_sparse_attention(
            **there,
            block_map=block_map.to(DEVICE),
            scale=d**-0.5,
            bound=50.0 if bounded else math.inf,
            return_lse=lse,
            backend="triton",
        )
    config = launcher.launch_config(there["q"], there["k"], there["v"], bounded=bounded, lse=lse)
    options = {"scale": d**-0.5, "bounded": bounded, "return_lse": lse} | launcher.rounding_of(config, there["v"])
    wanted, wanted_sums = sparse_attention(**given, block_map=block_map, **options)
    distance = max(DISTANCE, attention_distance(fmt, DEVICE))
    assert violations(measure(out.cpu().float(), wanted.float()), distance=distance, slope=None) == []
    if lse:
        torch.testing.assert_close(sums.cpu(), wanted_sums, atol=1e-4, rtol=1e-4)
