"""Committed results, and nothing else, make "auto" take a CUDA kernel."""

from __future__ import annotations

import json

from bench.report import preferences
from bench.report.data import load
from bench.results import merged
from happyhorse_fast.ops.runtime.dispatch import PREFERENCES


def entry(op, impl, ms, *, size="1080p-5s", precision="fp8", verified=True):
    return {"case": f"{op}/{size}/{precision}", "impl": impl, "median_ms": ms, "verified": verified}


HEADER = {"gpu": "h100", "driver": "580", "torch": "2.11", "triton": "3.6", "commit": "abc"}


def data(*entries, capability="90"):
    return {**HEADER, "capability": capability, "entries": list(entries)}


def test_faster_in_every_case_is_preferred():
    file = data(
        entry("rmsnorm_quantize", "triton", 1.5),
        entry("rmsnorm_quantize", "cuda", 1.2),
        entry("rmsnorm_quantize", "triton", 3.0, size="1080p-15s"),
        entry("rmsnorm_quantize", "cuda", 2.0, size="1080p-15s"),
        entry("block_sparse_attention-window", "triton", 9.0, precision="bf16"),
        entry("block_sparse_attention-window", "cuda", 6.0, precision="bf16"),
    )
    assert preferences.preferences([file]) == {"90": {"bf16": ["block_sparse_attention"], "fp8": ["rmsnorm_quantize"]}}


def test_the_faster_of_triton_s_two_kernels_is_the_one_to_beat():
    cuda, plain = entry("qkv_linear", "cuda", 4.0), entry("qkv_linear", "triton", 6.0)
    for ms, found in ((4.9, {}), (5.1, {"90": {"fp8": ["qkv_linear"]}}), (7.0, {"90": {"fp8": ["qkv_linear"]}})):
        for entries in (
            [cuda, plain, entry("qkv_linear", "hopper", ms)],
            [entry("qkv_linear", "hopper", ms), plain, cuda],
        ):
            assert preferences.preferences([data(*entries)]) == found


def test_attention_s_formats_are_formats_too():
    file = data(
        entry("select_blocks-25%", "triton", 2.0, precision="int8_qk"),
        entry("select_blocks-25%", "cuda", 1.0, precision="int8_qk"),
    )
    assert preferences.preferences([file]) == {"90": {"int8_qk": ["select_blocks"]}}


def test_what_the_order_of_timing_may_explain_is_not_preferred():
    file = data(
        entry("rmsnorm_quantize", "triton", 1.24),
        entry("rmsnorm_quantize", "cuda", 1.0),
        entry("select_blocks", "triton", 2.0),
        entry("select_blocks", "cuda", 1.0),
        entry("select_blocks", "triton", 1.2, size="540p-5s"),
        entry("select_blocks", "cuda", 1.0, size="540p-5s"),
    )
    assert preferences.preferences([file]) == {}


def test_on_an_h200_blocks_are_selected_in_cuda_and_nothing_else_is_preferred():
    # 0.33 against 0.56 ms; rmsnorm_quantize and qkv_linear are 8 % faster, each timed by itself.
    assert preferences.preferences(load().gpu.values()) == {"90": {"bf16": ["select_blocks"], "fp8": ["select_blocks"]}}


def test_what_is_not_shown_is_not_preferred():
    slower_once = data(
        entry("select_blocks", "triton", 1.0),
        entry("select_blocks", "cuda", 0.5),
        entry("select_blocks", "triton", 1.0, size="540p-5s"),
        entry("select_blocks", "cuda", 1.5, size="540p-5s"),
    )
    red = data(entry("qkv_linear", "triton", 5.0), entry("qkv_linear", "cuda", None, verified=False))
    alone = data(entry("qkv_linear", "cuda", 3.5))
    no_kernel = data(entry("fp8_linear", "triton", 5.0), entry("fp8_linear", "cuda", 3.5))
    unknown = {"entries": [entry("qkv_linear", "triton", 5.0), entry("qkv_linear", "cuda", 3.5)]}
    for file in (slower_once, red, alone, no_kernel, unknown):
        assert preferences.preferences([file]) == {}


def test_the_newest_file_of_an_architecture_counts():
    old = data(entry("qkv_linear", "triton", 5.0), entry("qkv_linear", "cuda", 3.5))
    new = data(entry("qkv_linear", "triton", 3.0), entry("qkv_linear", "cuda", 3.5))
    other = data(entry("qkv_linear", "triton", 5.0), entry("qkv_linear", "cuda", 3.5), capability="100")
    assert preferences.preferences([merged([old, new]), other]) == {"100": {"fp8": ["qkv_linear"]}}


def test_what_several_calls_measured_counts_together():
    # One call timed Triton, the next CUDA, a third one other ops only.
    calls = [
        data(entry("qkv_linear", "triton", 5.0)),
        data(entry("qkv_linear", "cuda", 3.5)),
        data(entry("rmsnorm_quantize", "triton", 1.0)),
    ]
    assert preferences.preferences([merged(calls)]) == {"90": {"fp8": ["qkv_linear"]}}
    red = data(entry("qkv_linear", "cuda", None, verified=False))
    assert preferences.preferences([merged([*calls, red])]) == {}, "a gate that turned red takes it back"
    other = data(entry("qkv_linear", "triton", 3.0)) | {"gpu": "h200"}
    assert preferences.preferences([merged(calls), other]) == {"90": {"fp8": ["qkv_linear"]}}, "another GPU's Triton"


def test_the_shipped_file_is_that_of_the_committed_results():
    assert PREFERENCES.read_text() == json.dumps(preferences.preferences(load().gpu.values()), indent=1) + "\n"
