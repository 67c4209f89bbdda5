"""Launchers of the `rmsnorm_qkv` kernels, as torch.library ops; arguments were checked by `ops.rmsnorm_qkv`."""

from __future__ import annotations

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from happyhorse_fast.kernels.launch import FP8_SINCE, FP_FUSION, LaunchConfig, config_for
from happyhorse_fast.kernels.rmsnorm_qkv import qkv_linear_kernel, rmsnorm_quantize_kernel
from happyhorse_fast.ops import rmsnorm_qkv as shapes
from happyhorse_fast.ops.triton.device import architecture, descriptors_work, multiprocessors, on_device
from happyhorse_fast.ops.triton.library import kernel_op, launchable
from happyhorse_fast.reference.quantize import FORMATS
from happyhorse_fast.reference.quantized_qkv import empty_normalised, empty_qkv

STEM = "rmsnorm_qkv"


@kernel_op("happyhorse_fast::rmsnorm_quantize", kernel=rmsnorm_quantize_kernel, mutates_args=("hidden",))
def rmsnorm_quantize(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    row_tiles: torch.Tensor,
    branch: torch.Tensor | None = None,
    out: str = "bf16",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`happyhorse_fast.ops.rmsnorm_qkv.rmsnorm_quantize`."""
    if out == "fp8":
        _require_e4m3('out="fp8"', hidden.device)
    config = config_for(STEM, "rmsnorm_quantize", architecture(hidden.device))
    x, scale = empty_normalised(hidden, out)
    added = hidden if branch is None else branch
    channels = hidden.shape[1]
    with on_device(hidden):
        launchable(rmsnorm_quantize_kernel)[(shapes.ROW_TILE // config.block_m, row_tiles.shape[0])](
            hidden,
            added,
            norm_weight,
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
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
    return x, scale


@kernel_op("happyhorse_fast::qkv_linear", kernel=qkv_linear_kernel)
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
    fmt = FORMATS[weight.dtype]
    if "fp8" in (fmt, out):
        _require_e4m3(f'out="{out}" of {weight.dtype} weights', x.device)
    config = config_for(STEM, f"qkv_{fmt}", architecture(x.device))
    q, k, v, q_scale, k_scale, v_scale, gate = results = empty_qkv(cos_sin, num_heads_q, num_heads_kv, out)
    head_dim = cos_sin.shape[1]
    width = config.block_n // 128 * head_dim
    described = config.descriptors and descriptors_work(x, weight)
    with on_device(x):
        launchable(qkv_linear_kernel)[_grid(x.device, row_tiles, weight, width)](
            _tiled(x, shapes.ROW_TILE, config) if described else x,
            # A kernel takes a pointer for every argument: one that its flags leave unread stands in for a None.
            qk_norm if x_scale is None else x_scale,
            _tiled(weight.flatten(0, 1), width, config) if described else weight,
            qk_norm if weight_scale is None else weight_scale,
            qk_norm,
            cos_sin,
            row_tiles,
            qk_norm if qk_scale is None else qk_scale,
            q,
            k,
            v,
            q_scale,
            k_scale,
            v_scale,
            gate,
            row_tiles.shape[0],
            x.stride(0),
            -(-x.shape[0] // shapes.ROW_TILE),
            C=x.shape[1],
            D=head_dim,
            HQ=num_heads_q,
            HKV=num_heads_kv,
            CODES=fmt != "bf16",
            INT8=fmt == "int8",
            INT8_QK=out == "int8_qk",
            FP8_OUT=out == "fp8",
            DESCRIPTORS=described,
            BLOCK_M=shapes.ROW_TILE,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
    return results


def _require_e4m3(what: str, device: torch.device) -> None:
    """Triton has no e4m3 below sm_89: not as an operand, and not as a cast either."""
    if architecture(device) < FP8_SINCE:
        raise ValueError(f"{what} needs e4m3, from sm_{FP8_SINCE} on; {device} is sm_{architecture(device)}")


def _tiled(x: torch.Tensor, rows: int, config: LaunchConfig) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, config.block_k])


def _grid(device: torch.device, row_tiles: torch.Tensor, weight: torch.Tensor, width: int) -> tuple[int]:
    tiles = row_tiles.shape[0] * -(-weight.shape[1] // width)
    return (min(tiles, multiprocessors(device)),)


rmsnorm_quantize.register_fake(shapes.fake_rmsnorm_quantize)
qkv_linear.register_fake(shapes.fake_qkv_linear)
