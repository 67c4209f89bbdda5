"""The cost model against the figures of docs/DESIGN.md and the published description, to the quoted digits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import (
    GPUS,
    OUTSIDE,
    attention_pairs,
    gpu_named,
    layer_kind,
    step_costs,
    totals,
    usable_bytes,
    window_share,
)
from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.sizes import parameters
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens, tokens_for

FULL = ModelConfig.preset("happyhorse-1.0-15b")
DENSE = ModelConfig.preset("happyhorse-1.0-15b-dense")
CLIP = tokens_for("1080p")


def test_parameters_are_the_published_ones() -> None:
    counted = parameters(FULL)
    assert f"{counted['total'] / 1e9:.1f} {counted['active_per_token'] / 1e9:.1f}" == "15.3 10.9"


@pytest.mark.parametrize(
    ("seconds", "fps", "video", "total", "share"),
    [(5, 24, 63240, 64001, 60), (5, 25, 65280, 66046, 59), (10, 24, 124440, 125321, 34), (15, 24, 185640, 186641, 24)],
)
def test_tokens_and_window_share(seconds: int, fps: int, video: int, total: int, share: int) -> None:
    clip = tokens_for("1080p", seconds=seconds, fps=fps)
    assert (clip.video, clip.total()) == (video, total)
    assert round(100 * window_share(clip.T, 11)) == share


def test_linear_and_attention_flops_of_a_step() -> None:
    windowed, dense = (totals(step_costs(config, CLIP)) for config in (FULL, DENSE))
    quarter = totals(step_costs(DENSE, CLIP, video_share=0.25))
    figures = (windowed["linear_flops"], *(of["attention_flops"] for of in (dense, windowed, quarter)))
    assert [f"{f / 1e15:.2f}" for f in figures] == ["1.40", "3.36", "2.32", "0.90"]


@pytest.mark.parametrize(("share", "per_step"), [(None, "1.9"), (0.25, "1.2")])
def test_the_fp8_limit_of_products_alone(share: float | None, per_step: str) -> None:
    costs = step_costs(FULL, CLIP, precision="fp8", video_share=share)
    products = [c for c in costs if c.flops and c.kind != OUTSIDE]
    assert f"{sum(c.count * c.floor_ms for c in products) / 1e3:.1f}" == per_step


@pytest.mark.parametrize("frames", [1, 2, 5, 9])
@pytest.mark.parametrize("receptive_field", [0, 1, 3, 11])
def test_pairs_are_those_of_the_attention_ranges(frames: int, receptive_field: int) -> None:
    clip, text = ClipTokens(T=frames, H=4, W=6, audio=4 * frames - 3), 7
    grid = sequence.Clip(frames, 2, 3, clip.audio, text)
    ranges = sequence.local_ranges(grid, receptive_field)
    counted = sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in ranges)
    assert attention_pairs(clip, text, window_share(frames, receptive_field)) == pytest.approx(counted)
    assert attention_pairs(clip, text) == grid.total**2


def test_every_layer_is_counted_once_and_kinds_differ() -> None:
    costs = step_costs(FULL, CLIP)
    kinds = {c.kind: c.count for c in costs if c.kind != OUTSIDE}
    assert kinds == {
        "sandwich gelu7 window": 3,
        "sandwich gelu7 dense": 1,
        "shared swiglu7 window": 25,
        "shared swiglu7 dense": 7,
        "sandwich swiglu7 window": 4,
    }
    assert layer_kind(FULL, 5, tokens_for("540p")) == "shared swiglu7 dense"  # the preset's window starts at 1080p
    assert "post-norm" in layer_kind(FULL.replace(post_norm_layers=(5,)), 5, CLIP)


def test_a_floor_is_compute_or_bandwidth_whichever_is_slower() -> None:
    for cost in step_costs(FULL, CLIP, gpu=GPUS["h200"]):
        rate = 67e12 if cost.kind == OUTSIDE else 989e12
        assert cost.floor_ms == pytest.approx(1e3 * max(cost.flops / rate, cost.bytes / 4.8e12))
    tiny = step_costs(FULL, ClipTokens(T=1, H=2, W=2, audio=1), text=1)
    by_op = {c.op: c for c in tiny if c.kind == "shared swiglu7 dense"}
    weights = 27304 * 5120 * 2
    assert by_op["up"].floor_ms == pytest.approx(1e3 * weights / 3.35e12, rel=0.01)  # 3 tokens: the weights' transfer


def test_fp8_moves_fewer_bytes_and_takes_half_the_time() -> None:
    bf16, fp8 = (totals(step_costs(FULL, CLIP, precision=p)) for p in ("bf16", "fp8"))
    assert fp8["flops"] == bf16["flops"]
    assert fp8["bytes"] < bf16["bytes"]
    assert 1.8 < bf16["floor_ms_per_step"] / fp8["floor_ms_per_step"] < 2.0


def test_attention_in_int8_multiplies_half_in_bf16() -> None:
    bf16, int8 = ({c.op: c for c in step_costs(FULL, CLIP, attention=a)} for a in ("bf16", "int8_qk"))
    assert int8["attention"].floor_ms == pytest.approx(0.75 * bf16["attention"].floor_ms, rel=1e-3)  # 989 and 1979
    assert all(int8[op] == bf16[op] for op in bf16 if op not in ("attention", "qkv"))
    n, q, kv = CLIP.total(TEXT_TOKENS), FULL.num_heads_q * FULL.head_dim, FULL.num_heads_kv * FULL.head_dim
    assert bf16["qkv"].bytes - int8["qkv"].bytes == n * (q + kv)
    a100 = {c.op: c for c in step_costs(FULL, CLIP, attention="int8_qk", gpu=GPUS["a100"])}
    assert a100["attention"].floor_ms == pytest.approx(int8["attention"].floor_ms * 989 / 312, rel=1e-2)
    mixed, fp8 = ({c.op: c for c in step_costs(FULL, CLIP, attention=a)} for a in ("int8_qk_fp8_v", "fp8"))
    assert mixed == fp8, "of one rate and size: scales are left out"
    with pytest.raises(ValueError, match="a100 has no int8_qk_fp8_v"):
        step_costs(FULL, CLIP, attention="int8_qk_fp8_v", gpu=GPUS["a100"])


def test_attention_can_stay_in_bf16() -> None:
    """What precision="fp8" runs by default: docs/decisions/0010 gives 3.1 s a step."""
    bf16, mixed, fp8 = (
        {c.op: c for c in step_costs(FULL, CLIP, precision=p, attention=a)}
        for p, a in (("bf16", None), ("fp8", "bf16"), ("fp8", None))
    )
    assert mixed["attention"].floor_ms == bf16["attention"].floor_ms
    assert fp8["attention"].bytes < mixed["attention"].bytes < bf16["attention"].bytes  # its output is in fp8
    assert all(mixed[op] == fp8[op] for op in fp8 if op not in ("attention", "qkv"))  # qkv writes what attention reads
    step = totals(step_costs(FULL, CLIP, precision="fp8", attention="bf16"))["floor_ms_per_step"]
    assert step == pytest.approx(3140, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8", "gpu": GPUS["a100"]}, "a100 has no fp8"),
        ({"precision": "int4"}, "precision must be one of bf16, int8, fp8; got 'int4'"),
        ({"attention": "int4"}, "attention must be one of bf16, int8_qk, int8_qk_fp8_v, fp8; got 'int4'"),
        ({"precision": "int8_qk"}, "precision must be one of bf16, int8, fp8; got 'int8_qk'"),
        ({"text": 0}, "text must be at least 1 token, got 0"),
        ({"video_share": 1.5}, "video_share must be from 0 to 1, got 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_costs(FULL, CLIP, **arguments)  # type: ignore[arg-type]


def test_an_unknown_card_is_named() -> None:
    with pytest.raises(ValueError, match="gpu must be one of h100, h200, a100, rtx4090, rtx5090; got 'tpu'"):
        gpu_named("tpu")


def test_every_card_names_its_source() -> None:
    assert all("NVIDIA" in gpu.source for gpu in GPUS.values())


def test_no_torch_is_loaded() -> None:
    code = "import sys, happyhorse_fast.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_rule_says_what_fits_a_card() -> None:
    """24 x 10^9 bytes are 22.35 GiB, of which 0.5 stay free."""
    gib = 2**30
    assert 21.8 * gib <= usable_bytes(24) < 22.0 * gib
