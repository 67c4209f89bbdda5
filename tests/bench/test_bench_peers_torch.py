"""Peers that are torch's own: the library's products, attention and FlexAttention do the work of the case."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_bench_peers import BF16, CPU, case_of, close, exact, not_compiled, peer_of
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.cases import cases, select
from bench.measure.roofline import fp8_product, int8_product
from bench.peers.registry import bf16_inputs


def test_scaled_mm_takes_the_layouts_and_scales_that_it_is_given():
    # Its meta function holds the rules of the GPU's: row-major times column-major, scales [M, 1] and [1, N] in float32.
    case = case_of("down/tiny/fp8")
    peer = peer_of("torch._scaled_mm")
    assert peer.fits(case) and not peer.fits(case_of("down/tiny/bf16"))
    assert not peer.fits(case_of("gelu7/tiny/fp8")), "three experts are three products"
    with FakeTensorMode():
        result = fp8_product(256, 512, 1024, torch.device("cuda"))()
        assert (result.shape, result.dtype) == ((256, 512), BF16)
        x = torch.empty(256, 1024, dtype=torch.float8_e4m3fn, device="cuda")
        weight = torch.empty(1024, 512, dtype=torch.float8_e4m3fn, device="cuda")  # row-major: what is not taken
        scales = (torch.empty(s, device="cuda") for s in ((256, 1), (1, 512)))
        with pytest.raises(RuntimeError, match="col_major"):
            torch._scaled_mm(x, weight, *scales, out_dtype=BF16)


def test_int_mm_takes_the_layouts_that_it_is_given_and_stands_beside_scaled_mm():
    case, *others = (case_of(f"swiglu7/tiny/{precision}") for precision in ("int8", "fp8", "bf16"))
    peer = peer_of("torch._int_mm")
    assert peer.fits(case) and peer_of("torch._scaled_mm").fits(case) and not any(peer.fits(other) for other in others)
    assert not peer.fits(case_of("gelu7/tiny/int8")), "three experts are three products"
    with FakeTensorMode():
        result = int8_product(256, 512, 1024, torch.device("cuda"))()
        assert (result.shape, result.dtype) == ((256, 512), torch.int32)


def test_every_product_is_held_against_the_librarys_bf16_one():
    peer = peer_of("torch.mm bf16")
    for words in ("down/tiny/fp8", "down/tiny/bf16", "qkv_linear/tiny/fp8", "swiglu7/tiny/bf16"):
        case = case_of(words)
        assert peer.fits(case)
        assert peer.prepare(case, bf16_inputs(case, CPU))().shape == (case.rows, case.weight_shape(case.product)[1])
    for words in ("gelu7/tiny/fp8", "sparse_attention-dense/tiny/fp8", "quantize/tiny/bf16"):
        assert not peer.fits(case_of(words))


def test_no_window_is_compiled_for_minutes():
    case = case_of("window/tiny/fp8")
    with pytest.raises(LookupError, match="compile for minutes"):
        peer_of("torch.compile").prepare(case, bf16_inputs(case, CPU))


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_sdpa_backends(backend, monkeypatch):
    from torch.nn import attention

    asked = []
    monkeypatch.setattr(attention, "sdpa_kernel", lambda which: asked.append(which) or contextlib.nullcontext())
    case = case_of("sparse_attention-dense/tiny/bf16")
    _, found = select(cases("tiny"), "attention-dense/tiny/bf16")  # without a gate and a known bound, as a peer has it
    peer = peer_of(f"sdpa {backend}")
    assert peer.fits(case) and peer.fits(found) and not peer_of("eager").fits(found)
    inputs = bf16_inputs(case, CPU)
    assert close(peer.prepare(case, inputs)()[0].transpose(0, 1), exact(inputs, masked=False))
    assert asked == [getattr(attention.SDPBackend, f"{backend.upper()}_ATTENTION")]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("part", ["window", "25%"])
def test_flex_attention_has_the_very_same_mask(part, monkeypatch):
    not_compiled(monkeypatch)
    case = case_of(f"attention-{part}/tiny/bf16")
    inputs = bf16_inputs(case, CPU)
    wanted = exact(inputs, masked=True)
    assert close(peer_of("flex_attention").prepare(case, inputs)()[0].transpose(0, 1), wanted)
    assert not close(exact(inputs, masked=False), wanted, within=0.05), "the mask leaves something out"
