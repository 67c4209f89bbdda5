"""Launchers of the CUDA kernels of the `rmsnorm_qkv` stem, as torch.library ops; `ops.rmsnorm_qkv` checks arguments."""

from __future__ import annotations

import ctypes

import torch

from happyhorse_fast.ops import rmsnorm_qkv as shapes
from happyhorse_fast.ops.cuda.arguments import address, require_vectors
from happyhorse_fast.ops.cuda.launch import launch
from happyhorse_fast.ops.cuda.library_product import check_operands, library_product, scale_of_one
from happyhorse_fast.ops.cuda.qk_norm_rope import finish_rows
from happyhorse_fast.ops.cuda.row_spans import RowTiles, chunks, expert_spans
from happyhorse_fast.reference.quantized_qkv import empty_normalised, empty_qkv

# Of csrc/device/rmsnorm_quantize.cu: a thread holds up to 8 vectors of 4 channels.
VECTORS_PER_THREAD, VECTOR, WARP = 8, 4, 32
SCRATCH_BYTES = 2 * WARP * 4
FORMATS = ("bf16", "int8", "fp8")
"""By their numbers in csrc/device/rmsnorm_quantize.cu."""


class RmsnormQuantizeParams(ctypes.Structure):
    """`RmsnormQuantizeParams` of csrc/device/rmsnorm_quantize.cu."""

    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("branch", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("row_tiles", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("branch_stride", ctypes.c_int64),
        ("channels", ctypes.c_int),
        ("format", ctypes.c_int),
    ]


@torch.library.custom_op("happyhorse_fast::rmsnorm_quantize_cuda", mutates_args=("hidden",))
def rmsnorm_quantize(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    row_tiles: torch.Tensor,
    branch: torch.Tensor | None = None,
    out: str = "bf16",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`happyhorse_fast.ops.rmsnorm_qkv.rmsnorm_quantize`."""
    require_vectors(VECTOR, hidden=hidden, branch=branch, norm_weight=norm_weight)
    x, scale = empty_normalised(hidden, out)
    channels = hidden.shape[1]
    params = RmsnormQuantizeParams(
        hidden=address(hidden),
        branch=address(branch),
        norm_weight=address(norm_weight),
        row_tiles=address(row_tiles),
        x=address(x),
        scale=address(scale),
        hidden_stride=hidden.stride(0),
        branch_stride=0 if branch is None else branch.stride(0),
        channels=channels,
        format=FORMATS.index(out),
    )
    threads = WARP * -(-channels // (VECTOR * VECTORS_PER_THREAD * WARP))
    grid = (shapes.ROW_TILE, row_tiles.shape[0], 1)
    launch("rmsnorm_quantize", "rmsnorm_quantize", params, grid, threads, SCRATCH_BYTES, hidden)
    return x, scale


@torch.library.custom_op("happyhorse_fast::qkv_linear_cuda", mutates_args=())
def qkv_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    row_tiles: torch.Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`happyhorse_fast.ops.rmsnorm_qkv.qkv_linear`."""
    check_operands(x, weight)
    results = empty_qkv(cos_sin, num_heads_q, num_heads_kv, out)
    experts, features, _ = weight.shape
    spans = expert_spans(row_tiles, experts, x.shape[0], whole_tiles=out != "bf16")
    one = scale_of_one(x)
    for expert, first, end in chunks(spans, features, 2 if x.dtype == shapes.BF16 else 4):
        product = library_product(x[first:end], weight[expert], one)
        rows = RowTiles(table=None, expert=expert, first=first, end=end)
        tiles = -(-(end - first) // shapes.ROW_TILE)
        finish_rows(product, x_scale, weight_scale, qk_norm, cos_sin, qk_scale, rows, tiles, results)
    return results


rmsnorm_quantize.register_fake(shapes.fake_rmsnorm_quantize)
qkv_linear.register_fake(shapes.fake_qkv_linear)
