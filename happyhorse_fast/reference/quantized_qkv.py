"""The `rmsnorm_qkv` ops of docs/OPS.md in plain torch, with the rounding points of the kernels.

Rows are handled in chunks, so that no op needs a [rows, features] tensor of all rows in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from happyhorse_fast import ambient
from happyhorse_fast.reference.quantize import (
    e4m3_rows,
    e4m3_scale,
    fragment_order,
    int8_rows,
    int8_scale,
    scaled_rows,
    to_e4m3,
    to_int8,
    widened,
)
from happyhorse_fast.reference.rmsnorm_qkv import rms_norm

ROW_TILE = 128
# Rows in flight: 4096 x 7296 float32 products are 120 MB.
ROW_CHUNK = 4096
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
NORMALISED = {"bf16": BF16, "int8": torch.int8, "fp8": E4M3}
"""What `rmsnorm_quantize` may give, by ``out``."""

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k, v, q_scale, k_scale, v_scale, gate."""
Span = tuple[int, int, int]
"""(expert, first row, end row)."""


def joined(tiles: Iterable[Span], most: int | None = None) -> list[Span]:
    """Neighbours of one expert joined, where ``most`` is given to at most that many rows."""
    found: list[Span] = []
    for expert, first, end in tiles:
        if found and found[-1][0] == expert and found[-1][2] == first and (most is None or end - found[-1][1] <= most):
            found[-1] = (expert, found[-1][1], end)
        else:
            found.append((expert, first, end))
    return found


def spans(row_tiles: torch.Tensor) -> list[Span]:
    """(expert, first row, end row) of ``row_tiles``, neighbours of one expert joined to at most ROW_CHUNK rows."""
    return joined(row_tiles.tolist(), ROW_CHUNK)


def empty_normalised(hidden: torch.Tensor, out: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of `rmsnorm_quantize`, not yet written: x [N, C] and its scale."""
    x = torch.empty(hidden.shape, dtype=NORMALISED[out], device=hidden.device)
    return x, torch.empty(0 if out == "bf16" else hidden.shape[0], dtype=torch.float32, device=hidden.device)


def empty_qkv(cos_sin: torch.Tensor, num_heads_q: int, num_heads_kv: int, out: str) -> QKV:
    """Results of `qkv_linear`, not yet written: q, k, v, q_scale, k_scale, v_scale, gate."""
    n, d = cos_sin.shape
    blocks = -(-n // ROW_TILE)
    none = (0,)
    codes = {"bf16": BF16, "int8_qk": torch.int8, "fp8": E4M3}[out]
    q_scale = {"bf16": none, "int8_qk": (n, num_heads_q), "fp8": (blocks,)}[out]
    k_scale = {"bf16": none, "int8_qk": (num_heads_kv, blocks), "fp8": (blocks,)}[out]
    v_shape = (num_heads_kv, d, blocks * ROW_TILE) if out == "fp8" else (n, num_heads_kv, d)
    v_scale = (num_heads_kv, blocks) if out == "fp8" else none

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=cos_sin.device)

    return (
        empty((n, num_heads_q, d), codes),
        empty((n, num_heads_kv, d), codes),
        empty(v_shape, E4M3 if out == "fp8" else BF16),
        empty(q_scale),
        empty(k_scale),
        empty(v_scale),
        empty((n, num_heads_q)),
    )


@ambient.independent
def rmsnorm_quantize(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    row_tiles: torch.Tensor,
    branch: torch.Tensor | None = None,
    out: str = "bf16",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add, RMSNorm and cast of whole rows.

    Args:
        hidden: [N, C] float32; ``branch`` is added to it in place.
        norm_weight: [E, C] float32.
        row_tiles: [tiles, 3] int32.
        branch: [N, C] bf16, or None.
        out: ``"bf16"``, or ``"int8"`` or ``"fp8"`` with one scale per row.

    Returns:
        x [N, C] bf16 and an empty scale, or x int8 or e4m3 and its scale [N] float32.
    """
    if branch is not None:
        hidden += branch
    x, scale = empty_normalised(hidden, out)
    for expert, first, end in spans(row_tiles):
        y = rms_norm(hidden[first:end], norm_weight[expert])
        if out == "bf16":
            x[first:end] = y.to(BF16)
        else:
            x[first:end], scale[first:end] = int8_rows(y) if out == "int8" else e4m3_rows(y)
    return x, scale


@ambient.independent
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
) -> QKV:
    """QKV product and its epilogue.

    Args:
        x: [N, C] bf16, or int8 or e4m3 with ``x_scale``.
        x_scale: [N] float32, or None.
        weight: [E, F, C] in the dtype of x, codes with ``weight_scale``.
        weight_scale: [E, F] float32, or None.
        qk_norm: [E, 2, D] float32.
        cos_sin: [N, D] float32.
        row_tiles: [tiles, 3] int32.
        num_heads_q: Hq.
        num_heads_kv: Hkv.
        out: ``"bf16"``, ``"int8_qk"`` or ``"fp8"``.
        qk_scale: [E, 2] float32, for ``"fp8"``.

    Returns:
        q, k, v, q_scale, k_scale, v_scale, gate as docs/OPS.md states them.

    Raises:
        ValueError: ``out`` is not ``"bf16"`` and a row tile does not start on a multiple of 128.
    """
    results = empty_qkv(cos_sin, num_heads_q, num_heads_kv, out)
    for expert, first, end in spans(row_tiles):
        rows = slice(first, end)
        product = (widened(x[rows]) @ widened(weight[expert]).T).float()
        if x_scale is None or weight_scale is None:
            product = product.to(BF16).float()
        else:
            product = product * x_scale[rows, None] * weight_scale[expert]
        _finish_rows(product, expert, first, end, qk_norm, cos_sin, qk_scale, results)
    return results


@ambient.independent
def qk_norm_rope(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    row_tiles: torch.Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    out: str,
    qk_scale: torch.Tensor | None = None,
) -> QKV:
    """The epilogue of :func:`qkv_linear` on a product that is there already.

    Args:
        product: [N, F] bf16, or float32 with ``row_scale`` and ``column_scale``.
        row_scale: [N] float32, or None.
        column_scale: [E, F] float32, or None.
        qk_norm: As in :func:`qkv_linear`, and so is what follows.
        cos_sin: [N, D] float32.
        row_tiles: [tiles, 3] int32.
        num_heads_q: Hq.
        num_heads_kv: Hkv.
        out: ``"bf16"``, ``"int8_qk"`` or ``"fp8"``.
        qk_scale: [E, 2] float32, for ``"fp8"``.

    Returns:
        q, k, v, q_scale, k_scale, v_scale, gate.

    Raises:
        ValueError: As :func:`qkv_linear`.
    """
    results = empty_qkv(cos_sin, num_heads_q, num_heads_kv, out)
    for expert, first, end in spans(row_tiles):
        part = scaled_rows(product, row_scale, column_scale, slice(first, end), expert)
        _finish_rows(part, expert, first, end, qk_norm, cos_sin, qk_scale, results)
    return results


def _finish_rows(
    product: torch.Tensor,
    expert: int,
    first: int,
    end: int,
    qk_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    qk_scale: torch.Tensor | None,
    results: QKV,
) -> None:
    """Write what rows ``first`` to ``end`` of the product, float32 [rows, F] with its scales, become in ``results``."""
    q, k, v, q_scale, k_scale, v_scale, gate = results
    rows = slice(first, end)
    queries, keys, values, gate[rows] = epilogue(product, qk_norm[expert], cos_sin[rows], q.shape[1], k.shape[1])
    if v.dtype == BF16:
        v[rows] = values.to(BF16)
    if q.dtype == BF16:
        q[rows], k[rows] = queries.to(BF16), keys.to(BF16)
        return
    if first % ROW_TILE:
        raise ValueError(f'row_tiles must start on multiples of {ROW_TILE} unless out is "bf16", got {first}')
    tiles = slice(first // ROW_TILE, -(-end // ROW_TILE))
    if q.dtype == torch.int8:
        q[rows], q_scale[rows] = quantize_q(queries)
        k[rows], k_scale[:, tiles] = quantize_k(keys)
        return
    assert qk_scale is not None
    for which, (to, scale, value) in enumerate(((q, q_scale, queries), (k, k_scale, keys))):
        to[rows] = to_e4m3(value * (1 / qk_scale[expert, which]))
        scale[tiles] = qk_scale[expert, which]
    slots = slice(tiles.start * ROW_TILE, tiles.stop * ROW_TILE)
    v[:, :, slots], v_scale[:, tiles] = quantize_v(values)


def epilogue(
    product: torch.Tensor, qk_norm: torch.Tensor, cos_sin: torch.Tensor, num_heads_q: int, num_heads_kv: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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


def rotate_pairs(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
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


def quantize_q(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per token and head.

    Args:
        q: [N, Hq, D] float32.

    Returns:
        codes [N, Hq, D] int8, scale [N, Hq] float32.
    """
    scale = int8_scale(q.abs().amax(dim=2))
    return to_int8(q * (1 / scale)[:, :, None]), scale


def quantize_k(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per head and 128 rows.

    Args:
        k: [N, Hkv, D] float32.

    Returns:
        codes [N, Hkv, D] int8, scale [Hkv, S] float32, S = N / 128 rounded up.
    """
    padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, -k.shape[0] % ROW_TILE))
    tiles = padded.unflatten(0, (-1, ROW_TILE))  # [S, 128, Hkv, D]
    scale = int8_scale(tiles.abs().amax(dim=(1, 3)))
    return to_int8(tiles * (1 / scale)[:, None, :, None]).flatten(0, 1)[: k.shape[0]], scale.T


def quantize_v(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per head and 128 rows, codes transposed and in :func:`fragment_order`.

    Args:
        v: [N, Hkv, D] float32.

    Returns:
        codes [Hkv, D, S * 128] e4m3, S = N / 128 rounded up, zero past N; scale [Hkv, S] float32.
    """
    padded = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, -v.shape[0] % ROW_TILE))
    tiles = padded.permute(1, 2, 0).unflatten(2, (-1, ROW_TILE))  # [Hkv, D, S, 128]
    scale = e4m3_scale(tiles.abs().amax(dim=(1, 3)))
    return fragment_order(to_e4m3(tiles * (1 / scale)[:, None, :, None]).flatten(2)), scale
