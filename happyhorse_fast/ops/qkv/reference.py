"""`rmsnorm_quantize` and `qkv_linear` of docs/OPS.md in plain torch, with the rounding points of the kernels.

Rows are handled in chunks, so that no op needs a [rows, features] tensor of all rows in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from happyhorse_fast.eager.qkv import rms_norm
from happyhorse_fast.kernels.launch import ROW_TILE
from happyhorse_fast.ops.qkv.contract import QKV, QkNormRope, QkvLinear, RmsnormQuantize
from happyhorse_fast.ops.quantize import (
    BF16,
    E4M3,
    E4M3_MAX,
    INT8_MAX,
    code_scale,
    e4m3_rows,
    fragment_order,
    int8_rows,
    products,
    scaled_products,
    to_e4m3,
    to_int8,
)
from happyhorse_fast.ops.runtime.operation import reference_op
from happyhorse_fast.ops.runtime.row_tiles import joined

# Rows in flight: 4096 x 7296 float32 products are 120 MB.
ROW_CHUNK = 4096


@reference_op(RmsnormQuantize)
def rmsnorm_quantize(given: RmsnormQuantize) -> tuple[Tensor, Tensor]:
    """Residual add, RMSNorm and cast of whole rows."""
    hidden, out = given.hidden, given.out
    if given.branch is not None:
        hidden += given.branch
    x, scale = given.empty()
    for expert, first, end in joined(given.row_tiles.tolist(), ROW_CHUNK):
        y = rms_norm(hidden[first:end], given.norm_weight[expert])
        if out == "bf16":
            x[first:end] = y.to(BF16)
        else:
            x[first:end], scale[first:end] = int8_rows(y) if out == "int8" else e4m3_rows(y)
    return x, scale


@reference_op(QkvLinear)
def qkv_linear(given: QkvLinear) -> QKV:
    """QKV product and its epilogue.

    Raises:
        ValueError: ``out`` is not ``"bf16"`` and a row tile does not start on a multiple of 128.
    """
    spans = joined(given.row_tiles.tolist(), ROW_CHUNK)
    return _finished(given, products(given.x, given.x_scale, given.weight, given.weight_scale, spans))


@reference_op(QkNormRope)
def qk_norm_rope(given: QkNormRope) -> QKV:
    """The epilogue of :func:`qkv_linear` on a product that is there already.

    Raises:
        ValueError: As :func:`qkv_linear`.
    """
    spans = joined(given.row_tiles.tolist(), ROW_CHUNK)
    return _finished(given, scaled_products(given.product, given.row_scale, given.column_scale, spans))


def _finished(given: QkvLinear | QkNormRope, parts: Iterator[tuple[int, slice, Tensor]]) -> QKV:
    """What (expert, rows, their product float32 [rows, F] with its scales) become."""
    q, k, v, q_scale, k_scale, v_scale, gate = results = given.empty()
    for expert, rows, product in parts:
        qk_norm, qk_scale = given.qk_norm[expert], given.qk_scale
        queries, keys, values, gate[rows] = epilogue(product, qk_norm, given.cos_sin[rows], q.shape[1], k.shape[1])
        if v.dtype == BF16:
            v[rows] = values.to(BF16)
        if q.dtype == BF16:
            q[rows], k[rows] = queries.to(BF16), keys.to(BF16)
            continue
        first, end = rows.start, rows.stop
        if first % ROW_TILE:
            raise ValueError(f'row_tiles must start on multiples of {ROW_TILE} unless out is "bf16", got {first}')
        tiles = slice(first // ROW_TILE, -(-end // ROW_TILE))
        if q.dtype == torch.int8:
            q[rows], q_scale[rows] = int8_rows(queries)
            k[rows], k_scale[:, tiles] = quantize_k(keys)
        else:
            assert qk_scale is not None
            for which, (to, scale, value) in enumerate(((q, q_scale, queries), (k, k_scale, keys))):
                to[rows] = to_e4m3(value * (1 / qk_scale[expert, which]))
                scale[tiles] = qk_scale[expert, which]
        if v.dtype == E4M3:
            slots = slice(tiles.start * ROW_TILE, tiles.stop * ROW_TILE)
            v[:, :, slots], v_scale[:, tiles] = quantize_v(values)
    return results


def epilogue(
    product: Tensor, qk_norm: Tensor, cos_sin: Tensor, num_heads_q: int, num_heads_kv: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """QK-norm, rotation and the gate's sigmoid on the product of rows of one expert, in float32.

    Args:
        product: [M, F].
        qk_norm: [2, D].
        cos_sin: [M, D].
        num_heads_q: Hq.
        num_heads_kv: Hkv.

    Returns:
        q [M, Hq, D], k and v [M, Hkv, D], gate [M, Hq].
    """
    d = cos_sin.shape[1]
    sizes = [num_heads_q, num_heads_kv, num_heads_kv, product.shape[1] // d - num_heads_q - 2 * num_heads_kv]
    q, k, v, gates = product.unflatten(1, (-1, d)).split(sizes, dim=1)
    q, k = (rotate_pairs(rms_norm(x, qk_norm[i]), cos_sin) for i, x in enumerate((q, k)))
    return q, k, v, torch.sigmoid(gates.flatten(1)[:, :num_heads_q])


def rotate_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate adjacent channels: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: [N, heads, D].
        cos_sin: [N, D], D/2 cosines then D/2 sines.

    Returns:
        [N, heads, D].
    """
    cos, sin = cos_sin[:, None].chunk(2, dim=2)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def quantize_k(k: Tensor) -> tuple[Tensor, Tensor]:
    """One scale per head and 128 rows.

    Args:
        k: [N, Hkv, D] float32.

    Returns:
        codes [N, Hkv, D] int8, scale [Hkv, S] float32, S = N / 128 rounded up.
    """
    padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, -k.shape[0] % ROW_TILE))
    tiles = padded.unflatten(0, (-1, ROW_TILE))  # [S, 128, Hkv, D]
    scale = code_scale(tiles.abs().amax(dim=(1, 3)), INT8_MAX)
    return to_int8(tiles * (1 / scale)[:, None, :, None]).flatten(0, 1)[: k.shape[0]], scale.T


def quantize_v(v: Tensor) -> tuple[Tensor, Tensor]:
    """One scale per head and 128 rows, codes transposed and in :func:`fragment_order`.

    Args:
        v: [N, Hkv, D] float32.

    Returns:
        codes [Hkv, D, S * 128] e4m3, S = N / 128 rounded up, zero past N; scale [Hkv, S] float32.
    """
    padded = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, -v.shape[0] % ROW_TILE))
    tiles = padded.permute(1, 2, 0).unflatten(2, (-1, ROW_TILE))  # [Hkv, D, S, 128]
    scale = code_scale(tiles.abs().amax(dim=(1, 3)), E4M3_MAX)
    return fragment_order(to_e4m3(tiles * (1 / scale)[:, None, :, None]).flatten(2)), scale
