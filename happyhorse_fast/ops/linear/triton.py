"""Launchers of the `fp8_linear` kernel; their arguments were checked."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from happyhorse_fast.kernels.activation_beside import fp8_linear_activation_beside_kernel
from happyhorse_fast.kernels.launch import FP8_SINCE, FP_FUSION, ROW_TILE, LaunchConfig, config_for, hopper_of
from happyhorse_fast.kernels.linear import fp8_linear_kernel
from happyhorse_fast.kernels.product_beside import COLUMNS
from happyhorse_fast.kernels.residual_beside import fp8_linear_residual_beside_kernel
from happyhorse_fast.ops.linear.contract import Linear, LinearActivation, LinearResidual, Product, activation_scale
from happyhorse_fast.ops.quantize import FORMATS
from happyhorse_fast.ops.runtime.triton.device import architecture, descriptors_work, multiprocessors
from happyhorse_fast.ops.runtime.triton.library import kernel_op
from happyhorse_fast.ops.runtime.triton.shared_tiles import described_operands

STEM = "linear"
ACCUMULATORS_PER_SM = 128 * 256
"""float32 accumulators that programs of one multiprocessor may hold: half of its registers."""
REDUCED_COLUMNS = 64
"""Columns that the hardware adds at a time: 32 KiB of shared memory beside four stages of a tile of 128 x 256."""


def launch(given: Product, out: Tensor, epilogue: str) -> None:
    """Write the product with its epilogue to ``out``.

    Raises:
        ValueError: ``out`` is e4m3 on a GPU that has none.
    """
    x, weight, row_tiles = given.x, given.weight, given.row_tiles
    config, arch = config_of(x, epilogue), architecture(x.device)
    if out.dtype == torch.float8_e4m3fn and arch < FP8_SINCE:
        raise ValueError(f"fp8 must be False on sm_{arch}: it has no casts to e4m3 (sm_{FP8_SINCE} and later have)")
    _, features, k = weight.shape
    described = config.descriptors and descriptors_work(x, weight)
    if config.hopper and described:
        launch_hopper(given, out, epilogue, hopper_of(config))
        return
    reduced = epilogue == "residual" and config.reduce and described and descriptors_work(out)
    tiles = row_tiles.shape[0] * (ROW_TILE // config.block_m) * -(-features // config.block_n)
    programs = multiprocessors(x.device) * max(1, ACCUMULATORS_PER_SM // (config.block_m * config.block_n))
    fp8_linear_kernel[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]) if described else x,
        # Every argument is a pointer; one that the flags leave unread stands in for what is not given.
        row_tiles if given.x_scale is None else given.x_scale,
        TensorDescriptor.from_tensor(weight.flatten(0, 1), [config.block_n, config.block_k]) if described else weight,
        row_tiles if given.weight_scale is None else given.weight_scale,
        row_tiles,
        TensorDescriptor.from_tensor(out, [config.block_m, REDUCED_COLUMNS]) if reduced else out,
        row_tiles.shape[0],
        F=features,
        K=k,
        ROW_TILE=ROW_TILE,
        CODES=x.dtype != torch.bfloat16,
        INT8=x.dtype == torch.int8,
        PER_ROW=per_row(given),
        EPILOGUE=epilogue,
        INVERSE=inverse_of(out, epilogue),
        REDUCE=REDUCED_COLUMNS if reduced else 0,
        DESCRIPTORS=described,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        **config.options(),
    )


def launch_hopper(given: Product, out: Tensor, epilogue: str, config: LaunchConfig) -> None:
    """Write the activation of the product to ``out``, or add the product, beside the tensor cores of Hopper."""
    x, weight, row_tiles = given.x, given.weight, given.row_tiles
    _, features, k = weight.shape
    items = row_tiles.shape[0] * -(-features // COLUMNS.value)
    kernel, constants = fp8_linear_residual_beside_kernel, dict[str, object]()
    if epilogue != "residual":
        kernel = fp8_linear_activation_beside_kernel
        constants = {"EPILOGUE": epilogue, "INVERSE": inverse_of(out, epilogue)}
    of_x, of_weight = described_operands(x, weight)
    kernel[(min(items, multiprocessors(x.device)),)](
        of_x,
        given.x_scale,
        of_weight,
        given.weight_scale,
        row_tiles,
        out,
        row_tiles.shape[0],
        items,
        F=features,
        K=k,
        INT8=x.dtype == torch.int8,
        PER_ROW=per_row(given),
        **constants,
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        enable_fp_fusion=FP_FUSION,
    )


def per_row(given: Product) -> int:
    """1 where every row of the inputs has a scale of its own, 0 where one is for all or there is none."""
    return int(given.x_scale is not None and given.x_scale.numel() > 1)


def inverse_of(out: Tensor, epilogue: str) -> float:
    """1 / scale of e4m3 results, 0 of others."""
    return 1.0 / activation_scale(epilogue) if out.dtype == torch.float8_e4m3fn else 0.0


def config_of(x: Tensor, epilogue: str) -> LaunchConfig:
    """The committed configuration for these inputs on their device."""
    return config_for(STEM, f"{FORMATS[x.dtype]}_{epilogue}", architecture(x.device))


@kernel_op("fp8_linear", Linear, kernel=fp8_linear_kernel)
def fp8_linear(given: Linear) -> Tensor:
    """Launch the product."""
    y = given.empty()
    launch(given, y, "plain")
    return y


@kernel_op("fp8_linear_residual", LinearResidual, kernel=fp8_linear_kernel)
def fp8_linear_residual(given: LinearResidual) -> None:
    """Launch the product, added to hidden."""
    launch(given, given.hidden, "residual")


@kernel_op("fp8_linear_activation", LinearActivation, kernel=fp8_linear_kernel)
def fp8_linear_activation(given: LinearActivation) -> Tensor:
    """Launch the product and its activation."""
    y = given.empty()
    launch(given, y, given.activation)
    return y
