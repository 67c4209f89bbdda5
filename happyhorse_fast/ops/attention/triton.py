"""Launcher of the Triton and Gluon kernels of block-sparse attention; its arguments were checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.kernels.attention import block_sparse_attention_kernel
from happyhorse_fast.kernels.attention_hopper import block_sparse_attention_hopper_kernel
from happyhorse_fast.kernels.hopper_sizes import GROUPS
from happyhorse_fast.kernels.launch import FP_FUSION, LaunchConfig, config_for
from happyhorse_fast.ops.attention.contract import BlockSparseAttention
from happyhorse_fast.ops.quantize import ATTENTION
from happyhorse_fast.ops.runtime.triton.device import architecture, descriptors_work, multiprocessors
from happyhorse_fast.ops.runtime.triton.library import kernel_op
from happyhorse_fast.ops.runtime.triton.shared_tiles import described_in_shared

STEM = "attention"
LONG = 4096
"""Keys from which on q, k and v are copied for the Hopper kernel where descriptors cannot read them."""
# Warps that fill an SM's 65,536 registers at 255 a thread.
WARPS_PER_SM = 8
I2FP_SINCE = 86
"""First compute capability that makes int32 float32 at the rate of additions."""


def variant_of(q: Tensor, v: Tensor) -> str:
    """Name of the launch table's entry: format and head dim."""
    fmt = next(name for name, dtypes in ATTENTION.items() if dtypes == (q.dtype, v.dtype))
    return f"{fmt}_d{q.shape[2]}"


def describable(x: Tensor) -> bool:
    """Whether TMA descriptors can read [A, B, C] as a matrix [A, B * C]: dense rows, 16-byte aligned."""
    return x.numel() > 0 and x.stride(2) == 1 and x.stride(1) == x.shape[2] and descriptors_work(x[:, 0])


def matrices(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as descriptors see them: [N, Hq * D], [M, Hkv * D], and [M, Hkv * D] or, e4m3, [Hkv * D, S * 128]."""
    return q.flatten(1), k.flatten(1), v.flatten(0, 1) if is_transposed(v) else v.flatten(1)


def described(x: Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """A matrix, read in tiles."""
    return TensorDescriptor.from_tensor(x, list(tile))


def launch_config(q: Tensor, k: Tensor, v: Tensor, *, bounded: bool = False, lse: bool = False) -> LaunchConfig:
    """The committed configuration for these tensors, with or without a bound on their scores and an LSE.

    The Hopper kernel has a running maximum where v is e4m3, and none otherwise.

    The "strided" entries read through pointers, in steps of 64 keys. Besides tensors that no descriptor can read, an
    LSE takes them where the softmax is bounded or v is e4m3: through descriptors, with heads of 128 on sm_90, e4m3
    spills 8 to 16 bytes a thread, as does bf16 with a flag (Triton 3.6.0 to 3.8.0), and with heads of 64 on sm_100 bf16
    with a flag 16 to 24. The Hopper kernel spills nothing.
    """
    name, arch = variant_of(q, v), architecture(q.device)
    config = config_for(STEM, name, arch)
    v_dense = v.is_contiguous() and v.data_ptr() % 16 == 0 if is_transposed(v) else describable(v)
    by_tiles = v_dense and describable(k)
    if config.hopper and by_tiles and describable(q) and (bounded or is_transposed(v)):
        return config_for(STEM, f"{name}_hopper", arch)
    if config.descriptors and (not by_tiles or (lse and (bounded or is_transposed(v)))):
        config = config_for(STEM, f"{name}_strided", arch)
    return dataclasses.replace(config, hopper=False)


def for_tiles(q: Tensor, k: Tensor, v: Tensor, forms: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, copied tokens first where that alone keeps the Hopper kernel from long sequences.

    At 64,256 tokens and 40:8 heads of 128, as [H, N, D], the copies move 1.8 GB, 0.4 ms of an H200. The Hopper kernel
    took 130 ms there, the plain one 169 to 195 through descriptors; through pointers it was not measured.
    """
    if k.shape[0] < LONG or not (is_transposed(v) or True in forms):
        return q, k, v
    if not config_for(STEM, variant_of(q, v), architecture(q.device)).hopper:
        return q, k, v
    q, k = (x if describable(x) else x.contiguous() for x in (q, k))
    return q, k, v if is_transposed(v) or describable(v) else v.contiguous()


def rounding_of(config: LaunchConfig, v: Tensor) -> dict[str, Any]:
    """Arguments of `ops.attention.reference` that put P's rounding where a launch of this configuration has it."""
    return {"step": config.block_n, "folded": config.hopper and is_transposed(v)}


def is_transposed(v: Tensor) -> bool:
    """e4m3 v is [Hkv, D, S * 128], bf16 v [M, Hkv, D]."""
    return v.dtype == torch.float8_e4m3fn


@kernel_op("block_sparse_attention", BlockSparseAttention, kernel=block_sparse_attention_kernel)
def block_sparse_attention(given: BlockSparseAttention) -> tuple[Tensor, Tensor]:
    """Launch the kernel of these tensors, in both forms of the softmax where there is a flag."""
    forms = [given.bounded] if given.flag is None else [True, False]
    q, k, v = for_tiles(given.q, given.k, given.v, forms)
    starts, return_lse = given.starts, given.return_lse
    out, lse = given.empty()
    n, m, map_rows = q.shape[0], k.shape[0], starts.shape[1]
    heads_q, d, heads_kv, map_heads = q.shape[1], q.shape[2], k.shape[1], starts.shape[0]
    if map_rows * heads_q == 0:
        return out, lse
    tensors = (
        out,
        given.out_scale,
        lse if return_lse else None,
        given.counts,
        starts,
        given.columns,
        given.mask_ids,
        given.mask_bits,
        given.order,
        given.q_scale,
        given.k_scale,
        given.v_scale,
        given.gate,
        given.flag,
        given.scale * math.log2(math.e),
    )
    sizes: dict[str, Any] = {
        "HEADS_Q": heads_q,
        "HEADS_KV": heads_kv,
        "MAP_HEADS": map_heads,
        "D": d,
        "BLOCK": BLOCK,
    }
    key_blocks = -(-m // BLOCK)
    stride_v = (v.stride(2), v.stride(0), v.stride(1)) if is_transposed(v) else v.stride()
    for form in forms:
        config = launch_config(q, k, v, bounded=form, lse=return_lse)
        k_tile = (config.block_n, d)
        v_tile = k_tile[::-1] if is_transposed(v) else k_tile
        if config.hopper:
            q_matrix, k_matrix, v_matrix = matrices(q, k, v)
            block_sparse_attention_hopper_kernel[(min(map_rows * heads_q, multiprocessors(q.device)),)](
                described_in_shared(q_matrix, (BLOCK // GROUPS.value, d)),
                described_in_shared(k_matrix, k_tile),
                described_in_shared(v_matrix, v_tile),
                *tensors,
                n,
                map_rows,
                key_blocks,
                map_rows * heads_q,
                STAGES=config.num_stages,
                num_warps=config.num_warps,
                enable_fp_fusion=FP_FUSION,
                **sizes,
            )
            continue
        items = map_rows * heads_q * (BLOCK // config.block_m)
        programs = multiprocessors(q.device) * max(1, WARPS_PER_SM // config.num_warps)
        k_source: Any = k
        v_source: Any = v
        if config.descriptors:
            _, k_matrix, v_matrix = matrices(q, k, v)
            k_source, v_source = described(k_matrix, k_tile), described(v_matrix, v_tile)
        block_sparse_attention_kernel[(min(items, programs),)](
            q,
            k_source,
            v_source,
            *tensors,
            n,
            m,
            map_rows,
            key_blocks,
            items,
            *q.stride(),
            *k.stride(),
            *stride_v,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            PV_FP8=is_transposed(v),
            DESCRIPTORS=config.descriptors,
            BOUNDED=form,
            BIASED=q.dtype == torch.int8 and architecture(q.device) < I2FP_SINCE,
            **config.options(),
            **sizes,
        )
    return out, lse
