"""Quantisation to e4m3 and int8, in plain torch and to the bit as docs/OPS.md states it: value = code * scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
E4M3_MAX = 448.0
INT8_MAX = 127.0
SMALLEST_SCALE = 2.0**-96
"""As of `kernels.numerics`, which says why."""
FORMATS = {BF16: "bf16", INT8: "int8", E4M3: "fp8"}
"""Formats of operands and their names; CUDA kernels number them in this order."""
DTYPES = {name: dtype for dtype, name in FORMATS.items()}
ATTENTION = {"bf16": (BF16, BF16), "int8_qk": (INT8, BF16), "int8_qk_fp8_v": (INT8, E4M3), "fp8": (E4M3, E4M3)}
"""Formats of attention -> dtypes of its q and k, and of its v, which is P's too."""
HADAMARD = 64
"""Neighbouring channels that :func:`hadamard` mixes."""


def code_scale(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """Scale that maps ``amax`` to the largest code.

    Args:
        amax: Largest magnitudes, any shape, float.
        largest: :data:`E4M3_MAX` or :data:`INT8_MAX`.

    Returns:
        amax * (1 / largest) in float32, at least 2^-96, of zeros too. NaN stays, which no code of int8 could say.
    """
    return (amax.float() * (1.0 / largest)).clamp(min=SMALLEST_SCALE)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Clamp to +-448, then cast: the cast alone gives NaN or saturates past it, depending on the release."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest integer, ties to even, and clamp to +-127: -128 is no code, so that a sign is a sign."""
    return x.round().clamp(-INT8_MAX, INT8_MAX).to(INT8)


def fragment_order(v: torch.Tensor) -> torch.Tensor:
    """Tokens in the order in which tensor cores hold P, so that no thread has to exchange codes of P with another.

    Of 16 tokens, token 8 i + 2 t + b (i and b below 2, t below 4) goes to place 4 t + 2 i + b: thread t of a quad holds
    tokens 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of a product's result, and as an operand's wants places 4 t to 4 t + 3
    (PTX ISA 8.7, fragments of wgmma.m64n8k32 and mma.m16n8k32).

    Args:
        v: [..., N], N a multiple of 16.
    """
    return v.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def token_order(v: torch.Tensor) -> torch.Tensor:
    """Undo :func:`fragment_order`."""
    return v.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Each 64 neighbouring channels times the orthonormal Hadamard matrix: h[i, j] = (-1)^popcount(i & j) / 8.

    It is its own inverse, and leaves a product as it is where both operands go through it; an outlier among 64 channels
    becomes a share of an eighth in each of them. What `quantize_rows` does to activations is done to weights at load.

    Args:
        x: [..., K], K a multiple of 64, float32 or float64.

    Returns:
        Of the shape and dtype of ``x``; sums of 64 values in that dtype, then times 1/8.

    Raises:
        ValueError: 64 does not divide K.
    """
    if x.shape[-1] % HADAMARD:
        raise ValueError(f"x must have a multiple of {HADAMARD} channels K, got {x.shape[-1]}")
    signs = x.new_ones(1, 1)
    while len(signs) < HADAMARD:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return (x.unflatten(-1, (-1, HADAMARD)) @ signs).flatten(-2) * 0.125


def e4m3_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row: a token's, or an output channel's of an expert.

    Args:
        x: [..., K], float32 or narrower.

    Returns:
        codes [..., K] e4m3, scale [...] float32.
    """
    scale = code_scale(x.float().abs().amax(dim=-1), E4M3_MAX)
    return to_e4m3(x.float() * (1 / scale)[..., None]), scale


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row, as :func:`e4m3_rows`: codes [..., K] int8, scale [...] float32."""
    scale = code_scale(x.float().abs().amax(dim=-1), INT8_MAX)
    return to_int8(x.float() * (1 / scale)[..., None]), scale


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One scale for the tensor, known beforehand.

    Args:
        x: Any shape, float32 or narrower.
        scale: [1] float32.

    Returns:
        Codes of x's shape, e4m3, of x * (1 / scale); what is past 448 scales becomes that.
    """
    return to_e4m3(x.float() * (1.0 / scale))


def widened(codes: torch.Tensor) -> torch.Tensor:
    """Operand of a product of codes: float32, and float64 of int8, whose sum is exact in int32 and not in float32."""
    return codes.double() if codes.dtype == INT8 else codes.float()


def products(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    spans: Iterable[Sequence[int]],
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Products of rows with their expert's weight: rounded to bf16 of bf16, times x_scale, then weight_scale of codes.

    Args:
        x: [N, K] bf16, or codes with their scales.
        x_scale: [N] or [1] float32, or None.
        weight: [E, F, K] in the dtype of x.
        weight_scale: [E, F] float32, or None.
        spans: (expert, first row, end row).

    Yields:
        Expert, rows and their product, float32 [rows, F].
    """
    expert, wide = -1, torch.empty(0, dtype=torch.float32)
    for e, first, end in spans:
        if e != expert:
            expert, wide = e, widened(weight[e]).T
        rows = slice(first, end)
        product = (widened(x[rows]) @ wide).float()
        if x_scale is None or weight_scale is None:
            yield e, rows, product.bfloat16().float()
        else:
            yield e, rows, product * x_scale.expand(len(x))[rows, None] * weight_scale[e]


def scaled_products(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    spans: Iterable[Sequence[int]],
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """The same of a product [N, F] that is there already: bf16, or float32 sums with row_scale [N] and column_scale."""
    for e, first, end in spans:
        rows = slice(first, end)
        part = product[rows].float()
        if row_scale is not None and column_scale is not None:
            part = part * row_scale[rows, None] * column_scale[e]
        yield e, rows, part


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """code * scale, computed in ``dtype``; float64 gives the exact value.

    Args:
        codes: [..., K] e4m3 or int8.
        scale: [1] (one for all), or [...] (one per row or output channel).
        dtype: Dtype of the result, float32 or float64.

    Returns:
        [..., K] in ``dtype``.

    Raises:
        ValueError: The shapes do not belong together.
    """
    if scale.shape not in ((1,), codes.shape[:-1]):
        raise ValueError(
            f"scale must be [1] or {list(codes.shape[:-1])} for codes {list(codes.shape)}, got {list(scale.shape)}"
        )
    return codes.to(dtype) * scale.to(dtype)[..., None]
