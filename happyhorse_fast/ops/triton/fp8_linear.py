"""Launchers of the `fp8_linear` kernel, as torch.library ops; arguments were checked by `ops.fp8_linear`."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from happyhorse_fast.kernels.fp8_linear import fp8_linear_kernel
from happyhorse_fast.kernels.launch import FP8_SINCE, FP_FUSION, LaunchConfig, config_for
from happyhorse_fast.ops import fp8_linear as shapes
from happyhorse_fast.ops.triton.device import architecture, descriptors_work, multiprocessors, on_device
from happyhorse_fast.ops.triton.library import kernel_op, launchable
from happyhorse_fast.reference.fp8_linear import activation_scale, empty_activated, empty_product
from happyhorse_fast.reference.quantize import FORMATS

STEM = "fp8_linear"
ACCUMULATORS_PER_SM = 128 * 256
"""float32 accumulators that programs of one multiprocessor may hold: half of its registers."""
REDUCED_COLUMNS = 64
"""Columns that the hardware adds at a time: 32 KiB of shared memory beside four stages of a tile of 128 x 256."""


def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    out: torch.Tensor,
    epilogue: str,
    config: LaunchConfig,
) -> None:
    """Write the product with its epilogue to ``out``.

    Raises:
        ValueError: ``out`` is e4m3 on a GPU that has none.
    """
    arch = architecture(x.device)
    if out.dtype == torch.float8_e4m3fn and arch < FP8_SINCE:
        raise ValueError(f"fp8 must be False on sm_{arch}: it has no casts to e4m3 (sm_{FP8_SINCE} and later have)")
    _, features, k = weight.shape
    described = config.descriptors and descriptors_work(x, weight)
    reduced = epilogue == "residual" and config.reduce and described and descriptors_work(out)
    tiles = row_tiles.shape[0] * (shapes.ROW_TILE // config.block_m) * -(-features // config.block_n)
    programs = multiprocessors(x.device) * max(1, ACCUMULATORS_PER_SM // (config.block_m * config.block_n))
    with on_device(x):
        launchable(fp8_linear_kernel)[(min(tiles, programs),)](
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]) if described else x,
            # Every argument is a pointer; one that the flags leave unread stands in for what is not given.
            row_tiles if x_scale is None else x_scale,
            TensorDescriptor.from_tensor(weight.flatten(0, 1), [config.block_n, config.block_k])
            if described
            else weight,
            row_tiles if weight_scale is None else weight_scale,
            row_tiles,
            TensorDescriptor.from_tensor(out, [config.block_m, REDUCED_COLUMNS]) if reduced else out,
            row_tiles.shape[0],
            F=features,
            K=k,
            ROW_TILE=shapes.ROW_TILE,
            CODES=x.dtype != torch.bfloat16,
            INT8=x.dtype == torch.int8,
            PER_ROW=int(x_scale is not None and x_scale.numel() > 1),
            EPILOGUE=epilogue,
            INVERSE=1.0 / activation_scale(epilogue) if out.dtype == torch.float8_e4m3fn else 0.0,
            REDUCE=REDUCED_COLUMNS if reduced else 0,
            DESCRIPTORS=described,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=FP_FUSION,
        )


def config_of(x: torch.Tensor, epilogue: str) -> LaunchConfig:
    """The committed configuration for these inputs on their device."""
    return config_for(STEM, f"{FORMATS[x.dtype]}_{epilogue}", architecture(x.device))


@kernel_op("happyhorse_fast::fp8_linear", kernel=fp8_linear_kernel)
def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
) -> torch.Tensor:
    """See :func:`happyhorse_fast.ops.fp8_linear.fp8_linear`."""
    y = empty_product(x, weight)
    launch(x, x_scale, weight, weight_scale, row_tiles, y, "plain", config_of(x, "plain"))
    return y


@kernel_op("happyhorse_fast::fp8_linear_residual", kernel=fp8_linear_kernel, mutates_args=("hidden",))
def fp8_linear_residual(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    hidden: torch.Tensor,
) -> None:
    """See :func:`happyhorse_fast.ops.fp8_linear.fp8_linear_residual`."""
    launch(x, x_scale, weight, weight_scale, row_tiles, hidden, "residual", config_of(x, "residual"))


@kernel_op("happyhorse_fast::fp8_linear_activation", kernel=fp8_linear_kernel)
def fp8_linear_activation(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    row_tiles: torch.Tensor,
    activation: str,
    fp8: bool,
) -> torch.Tensor:
    """See :func:`happyhorse_fast.ops.fp8_linear.fp8_linear_activation`."""
    y = empty_activated(x.shape[0], weight.shape[1], activation, fp8, x.device)
    launch(x, x_scale, weight, weight_scale, row_tiles, y, activation, config_of(x, activation))
    return y


fp8_linear.register_fake(shapes.fake_fp8_linear)
fp8_linear_residual.register_fake(shapes.fake_fp8_linear_residual)
fp8_linear_activation.register_fake(shapes.fake_fp8_linear_activation)
