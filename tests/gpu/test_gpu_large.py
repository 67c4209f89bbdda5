"""Tensors past 2^31 elements: the last rows come out as they do alone, so no offset wrapped."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, DRY, MARKS, RECORDED

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.ops import block_sparse_attention, fp8_linear, fp8_linear_residual, rmsnorm_quantize
from happyhorse_fast.ops.runtime.cuda.launch import cuda_obstacle

pytestmark = MARKS
# Recorded launches are specialised by widths and strides, not by rows.
LIMIT = 2**16 if DRY else 2**21 if RECORDED else 2**31


def rows_past(columns: int) -> int:
    """Rows, a multiple of 128, that make [rows, columns] pass the limit by at least a block."""
    return (LIMIT // columns // 128 + 2) * 128


def row_tiles(rows: int) -> torch.Tensor:
    starts = torch.arange(0, rows, 128, dtype=torch.int32, device=DEVICE)
    return torch.stack([torch.zeros_like(starts), starts, starts + 128], dim=1)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(len(shape)))


@pytest.fixture(autouse=True)
def enough_memory() -> None:
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """Of the ops that have a CUDA kernel of their own, both."""
    reason = cuda_obstacle(DEVICE) if request.param == "cuda" else None
    if reason:
        pytest.skip(reason)
    return str(request.param)


def test_rmsnorm_quantize(backend: str) -> None:
    columns = 512 if DRY else 5120
    hidden = normal(rows_past(columns), columns, dtype=torch.float32)
    norm = normal(1, columns, dtype=torch.float32)
    last = hidden[-128:].clone()
    x, _ = rmsnorm_quantize(hidden, norm, row_tiles(len(hidden)), backend=backend)
    alone, _ = rmsnorm_quantize(last, norm, row_tiles(128), backend=backend)
    assert x.numel() > LIMIT and torch.equal(x[-128:], alone)


def test_linear_reads() -> None:
    columns = 512 if DRY else 13_696
    x, weight = normal(rows_past(columns), columns), normal(1, 128, columns)
    y = fp8_linear(x, None, weight, None, row_tiles(len(x)))
    alone = fp8_linear(x[-128:].clone(), None, weight, None, row_tiles(128))
    assert x.numel() > LIMIT and torch.equal(y[-128:], alone)


def test_linear_writes() -> None:
    features = 512 if DRY else 5120
    hidden = torch.zeros(rows_past(features), features, device=DEVICE)
    x, weight = normal(len(hidden), 128), normal(1, features, 128)
    fp8_linear_residual(x, None, weight, None, row_tiles(len(x)), hidden)
    alone = torch.zeros(128, features, device=DEVICE)
    fp8_linear_residual(x[-128:].clone(), None, weight, None, row_tiles(128), alone)
    assert hidden.numel() > LIMIT and torch.equal(hidden[-128:], alone)


def test_attention_on_views_of_a_fused_product(backend: str) -> None:
    # As SageAttention #388: v strided by a whole q, k, v row; every block of 128 tokens sees itself.
    heads_q, heads_kv, d = (2, 1, 32) if DRY else (40, 8, 128)
    heads = heads_q + 2 * heads_kv
    fused = normal(rows_past(heads * d), heads, d)
    q, k, v = fused.split([heads_q, heads_kv, heads_kv], dim=1)
    spans = [(start, start + 128) for start in range(0, len(fused), 128)]
    block_map = BlockMap.from_ranges(spans, spans, len(fused), len(fused)).to(DEVICE)
    out, _, _ = block_sparse_attention(q, k, v, block_map, scale=d**-0.5, backend=backend)
    last = [x[-128:] for x in (q, k, v)]
    dense = BlockMap.dense(128, 128).to(DEVICE)
    alone, _, _ = block_sparse_attention(*last, dense, scale=d**-0.5, backend=backend)
    assert fused.numel() > LIMIT and torch.equal(out[-128:], alone)
