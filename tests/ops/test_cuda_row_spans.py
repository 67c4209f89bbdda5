"""Experts' rows on the host, for products by the library: read once per table, never in a capture; rows in chunks."""

from __future__ import annotations

import gc
from unittest import mock

import pytest
import torch
from qkv_cases import SHAPES, fp8_linear, make

from happyhorse_fast.ops.linear import op as linear_ops
from happyhorse_fast.ops.runtime.cuda import library_product


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@pytest.fixture
def capturing():
    with mock.patch.object(library_product, "is_capturing", return_value=True) as patched:
        yield patched


def test_spans_join_neighbours_of_one_expert():
    tiles = torch.tensor([[0, 0, 128], [0, 128, 130], [2, 130, 200], [1, 200, 201], [1, 201, 300]], dtype=torch.int32)
    spans = library_product.expert_spans(tiles, 3, 300, whole_tiles=False)
    assert spans == [(0, 0, 130), (2, 130, 200), (1, 200, 300)]
    with pytest.raises(ValueError, match=r'must start on multiples of 128 unless out is "bf16", got 130'):
        library_product.expert_spans(tiles, 3, 300, whole_tiles=True)


def test_chunks_are_whole_row_tiles_within_the_bound():
    spans = [(0, 0, 64_000), (1, 64_000, 64_129), (2, 64_129, 64_130)]
    chunks = list(library_product.chunks(spans, 27_392, 4))
    assert [c for c in chunks if c[0] > 0] == spans[1:]
    assert [(a, b) for e, a, b in chunks if e == 0] == [(a, min(a + 2432, 64_000)) for a in range(0, 64_000, 2432)]
    assert 2432 * 27_392 * 4 <= library_product.PRODUCT_BYTES < (2432 + 128) * 27_392 * 4
    assert list(library_product.chunks([(0, 0, 300)], 2**24, 4)) == [(0, 0, 128), (0, 128, 256), (0, 256, 300)]


def test_a_table_is_read_once_and_again_when_it_was_written(capturing):
    case = make(SHAPES["experts-aligned"])
    with pytest.raises(RuntimeError, match="row_tiles of several experts must reach the host before a CUDA graph"):
        fp8_linear(case, backend="cuda")
    capturing.return_value = False
    before = fp8_linear(case, backend="cuda")
    capturing.return_value = True
    assert same_bits(fp8_linear(case, backend="cuda"), before)
    case.row_tiles[0, 0] = 1
    with pytest.raises(RuntimeError, match="with the same row_tiles tensor"):
        fp8_linear(case, backend="cuda")
    capturing.return_value = False
    assert not same_bits(fp8_linear(case, backend="cuda"), before)
    case.row_tiles = case.row_tiles.clone()
    capturing.return_value = True
    with pytest.raises(RuntimeError, match="not a copy or a new view"):
        fp8_linear(case, backend="cuda")


def test_a_compiled_call_finds_what_an_eager_one_read(capturing):
    case = make(SHAPES["experts-aligned"])
    capturing.return_value = False
    expected = fp8_linear(case, backend="cuda")
    capturing.return_value = True
    compiled = torch.compile(lambda: fp8_linear(case, backend="cuda"), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(), expected)


def test_inference_tensors_are_remembered_too(capturing):
    with torch.inference_mode():
        tiles = torch.tensor([[0, 0, 128], [1, 128, 200]], dtype=torch.int32)
        capturing.return_value = False
        spans = library_product.expert_spans(tiles, 2, 200, whole_tiles=True)
        capturing.return_value = True
        assert library_product.expert_spans(tiles, 2, 200, whole_tiles=True) == spans == [(0, 0, 128), (1, 128, 200)]


def test_a_table_is_forgotten_with_its_tensor():
    tiles = torch.tensor([[0, 0, 128], [1, 128, 200]], dtype=torch.int32)
    gc.collect()
    before = len(library_product._read)
    library_product.expert_spans(tiles, 2, 200, whole_tiles=False)
    assert len(library_product._read) == before + 1
    del tiles
    gc.collect()
    assert len(library_product._read) == before


def test_one_expert_needs_no_table(capturing):
    case = make(SHAPES["tail-1-gqa5"])
    fp8_linear(case, "fp8", "cuda")
    assert not capturing.called


@pytest.mark.parametrize("name", ["tail-1-gqa5", "experts-aligned"])
def test_products_come_in_chunks_and_none_is_larger(name, monkeypatch):
    case = make(SHAPES[name])
    # Codes of -2 to 2 with three quarters of zeros: sums are exact, however a library cuts them.
    g = torch.Generator().manual_seed(1)
    for field in ("x", "codes"):
        shape = getattr(case, field).shape
        values = torch.randint(-2, 3, shape, generator=g) * (torch.rand(shape, generator=g) < 0.25)
        setattr(case, field, values.to(torch.float8_e4m3fn))
    whole = fp8_linear(case, "fp8", "cuda")
    sizes, ones, product = [], [], library_product.library_product

    def counted(x, weight, one):
        sizes.append(len(x))
        ones.append(one)
        return product(x, weight, one)

    monkeypatch.setattr(library_product, "library_product", counted)
    monkeypatch.setattr(library_product, "PRODUCT_BYTES", 1)
    assert same_bits(fp8_linear(case, "fp8", "cuda"), whole)
    assert sizes == {"tail-1-gqa5": [128, 1], "experts-aligned": [128, 128, 128, 57]}[name]
    assert len({id(one) for one in ones}) == 1, "made once, not per chunk"


@pytest.mark.parametrize("fp8", [False, True])
def test_an_activation_comes_in_chunks(fp8, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-2, 3, shape, generator=g) / 2 for shape in ((300, 64), (2, 256, 64)))
    tiles = torch.tensor([[0, 0, 128], [0, 128, 170], [1, 170, 298], [1, 298, 300]], dtype=torch.int32)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    scales = (torch.rand(300, generator=g), torch.rand(2, 256, generator=g)) if fp8 else (None, None)
    arguments = x.to(dtype), scales[0], weight.to(dtype), scales[1], tiles, "swiglu7", fp8
    whole = linear_ops.fp8_linear_activation(*arguments, backend="cuda")
    expected = linear_ops.fp8_linear_activation(*arguments, backend="reference")
    assert float((whole[0].float() != expected[0].float()).float().mean()) < 1e-3
    calls, product = [], library_product.library_product
    monkeypatch.setattr(library_product, "library_product", lambda *a: calls.append(a) or product(*a))
    monkeypatch.setattr(library_product, "PRODUCT_BYTES", 1)
    assert same_bits(linear_ops.fp8_linear_activation(*arguments, backend="cuda"), whole)
    assert [len(rows) for rows, *_ in calls] == [128, 42, 128, 2]
    assert len({id(one) for *_, one in calls}) == 1, "made once, not per chunk"
