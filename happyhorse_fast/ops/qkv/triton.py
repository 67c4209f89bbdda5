"""Launchers of the QKV kernels; their arguments were checked."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from happyhorse_fast.kernels.launch import (
    FP8_SINCE,
    FP_FUSION,
    HOPPER_HEAD_DIM,
    ROW_TILE,
    LaunchConfig,
    config_for,
    hopper_of,
)
from happyhorse_fast.kernels.product_beside import COLUMNS
from happyhorse_fast.kernels.qkv import qkv_linear_kernel, rmsnorm_quantize_kernel
from happyhorse_fast.kernels.qkv_beside import qkv_linear_beside_kernel
from happyhorse_fast.ops.qkv.contract import QKV, QkvLinear, RmsnormQuantize
from happyhorse_fast.ops.quantize import E4M3, FORMATS, INT8
from happyhorse_fast.ops.runtime.formats import uses_e4m3
from happyhorse_fast.ops.runtime.triton.device import architecture, descriptors_work, multiprocessors
from happyhorse_fast.ops.runtime.triton.library import kernel_op
from happyhorse_fast.ops.runtime.triton.shared_tiles import described_operands

STEM = "qkv"


@kernel_op("rmsnorm_quantize", RmsnormQuantize, kernel=rmsnorm_quantize_kernel)
def rmsnorm_quantize(given: RmsnormQuantize) -> tuple[Tensor, Tensor]:
    """Launch the kernel, a few rows of a tile in each program."""
    hidden, branch, row_tiles, out = given.hidden, given.branch, given.row_tiles, given.out
    if out == "fp8":
        _require_e4m3('out="fp8"', hidden.device)
    config = config_for(STEM, "rmsnorm_quantize", architecture(hidden.device))
    x, scale = given.empty()
    added = hidden if branch is None else branch
    channels = hidden.shape[1]
    rmsnorm_quantize_kernel[(ROW_TILE // config.block_m, row_tiles.shape[0])](
        hidden,
        added,
        given.norm_weight,
        row_tiles,
        x,
        scale,
        hidden.stride(0),
        added.stride(0),
        C=channels,
        HAS_BRANCH=branch is not None,
        # Not as a name: "int8" is one of Triton's types, and becomes it where a kernel is compiled ahead.
        FP8=out == "fp8",
        INT8=out == "int8",
        BLOCK_M=config.block_m,
        BLOCK_C=triton.next_power_of_2(channels),
        **config.options(),
    )
    return x, scale


@kernel_op("qkv_linear", QkvLinear, kernel=qkv_linear_kernel)
def qkv_linear(given: QkvLinear) -> QKV:
    """Launch the product and its epilogue in a persistent grid."""
    x, weight, qk_norm, row_tiles, out = given.x, given.weight, given.qk_norm, given.row_tiles, given.out
    fmt = FORMATS[weight.dtype]
    if uses_e4m3(fmt) or uses_e4m3(out):
        _require_e4m3(f'out="{out}" of {weight.dtype} weights', x.device)
    config = config_for(STEM, f"qkv_{fmt}", architecture(x.device))
    results = given.empty()
    head_dim = given.cos_sin.shape[1]
    width = config.block_n // 128 * head_dim
    described = config.descriptors and descriptors_work(x, weight)
    if config.hopper and described and head_dim == HOPPER_HEAD_DIM:
        launch_hopper(given, results, hopper_of(config))
        return results
    tiles = row_tiles.shape[0] * -(-weight.shape[1] // width)
    qkv_linear_kernel[(min(tiles, multiprocessors(x.device)),)](
        TensorDescriptor.from_tensor(x, [ROW_TILE, config.block_k]) if described else x,
        # A kernel takes a pointer for every argument: one that its flags leave unread stands in for a None.
        qk_norm if given.x_scale is None else given.x_scale,
        TensorDescriptor.from_tensor(weight.flatten(0, 1), [width, config.block_k]) if described else weight,
        qk_norm if given.weight_scale is None else given.weight_scale,
        qk_norm,
        given.cos_sin,
        row_tiles,
        qk_norm if given.qk_scale is None else given.qk_scale,
        *results,
        row_tiles.shape[0],
        x.stride(0),
        -(-x.shape[0] // ROW_TILE),
        C=x.shape[1],
        D=head_dim,
        HQ=given.num_heads_q,
        HKV=given.num_heads_kv,
        CODES=fmt != "bf16",
        INT8=fmt == "int8",
        INT8_QK=results[0].dtype == INT8,
        FP8_V=results[2].dtype == E4M3,
        DESCRIPTORS=described,
        BLOCK_M=ROW_TILE,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        **config.options(),
    )
    return results


def launch_hopper(given: QkvLinear, results: QKV, config: LaunchConfig) -> None:
    """Write the results by the kernel whose epilogue runs beside the tensor cores of Hopper."""
    x, weight, row_tiles = given.x, given.weight, given.row_tiles
    items = row_tiles.shape[0] * -(-weight.shape[1] // COLUMNS.value)
    of_x, of_weight = described_operands(x, weight)
    qkv_linear_beside_kernel[(min(items, multiprocessors(x.device)),)](
        of_x,
        given.x_scale,
        of_weight,
        given.weight_scale,
        given.qk_norm,
        given.cos_sin,
        row_tiles,
        given.qk_scale,
        *results,
        row_tiles.shape[0],
        items,
        -(-x.shape[0] // ROW_TILE),
        C=x.shape[1],
        HQ=given.num_heads_q,
        HKV=given.num_heads_kv,
        INT8=x.dtype == INT8,
        INT8_QK=results[0].dtype == INT8,
        FP8_V=results[2].dtype == E4M3,
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        enable_fp_fusion=FP_FUSION,
    )


def _require_e4m3(what: str, device: torch.device) -> None:
    """Triton has no e4m3 below sm_89: not as an operand, and not as a cast either."""
    if architecture(device) < FP8_SINCE:
        raise ValueError(f"{what} needs e4m3, from sm_{FP8_SINCE} on; {device} is sm_{architecture(device)}")
