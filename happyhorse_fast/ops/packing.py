"""Linear weights in the layout of the `fp8_linear` ops, padded once, and back."""

from __future__ import annotations

import torch

from happyhorse_fast.reference.quantize import dequantize, e4m3_channels

CHUNK = 4096
"""Output channels quantised at a time: 84 MB of float32 at 5120 inputs, rather than 561 MB for an up projection."""


def pack_linear(
    weight: torch.Tensor, experts: int, fp8: bool, *, pad_f_to: int = 128, pad_k_to: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split by expert, pad with zeros, and quantise or cast.

    A zero row gives zero features, which both activations keep zero; a zero column multiplies them: padding is exact.
    An up projection of 27,304 features becomes 27,392, and the down projection behind it 13,652 -> 13,696 inputs.

    Args:
        weight: [E * F, K] as published, experts stacked along the output.
        experts: E.
        fp8: e4m3 with one scale per output channel and expert, rather than bf16.
        pad_f_to: F is padded to a multiple of it: 128 before an activation, 1 where the product is a residual.
        pad_k_to: K is padded to a multiple of it: 64 behind swiglu7, 128 behind gelu7, else 1.

    Returns:
        packed [E, F', K'] bf16 and None; or packed e4m3 and its scale [E, F'] float32.

    Raises:
        ValueError: ``experts`` does not divide the rows, or a multiple is below 1.
    """
    rows, inputs = weight.shape
    if experts < 1 or rows % experts:
        raise ValueError(f"experts must divide the {rows} rows of weight, got {experts}")
    for name, multiple in (("pad_f_to", pad_f_to), ("pad_k_to", pad_k_to)):
        if multiple < 1:
            raise ValueError(f"{name} must be at least 1, got {multiple}")
    features = rows // experts
    shape = (experts, features + -features % pad_f_to, inputs + -inputs % pad_k_to)
    packed = torch.zeros(shape, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16, device=weight.device)
    published = weight.unflatten(0, (experts, features))
    if not fp8:
        packed[:, :features, :inputs] = published
        return packed, None
    scale = torch.ones(shape[:2], dtype=torch.float32, device=weight.device)
    for first in range(0, features, CHUNK):
        part = slice(first, min(first + CHUNK, features))
        packed[:, part, :inputs], scale[:, part] = e4m3_channels(published[:, part])
    return packed, scale


def unpack_linear(packed: torch.Tensor, scale: torch.Tensor | None, *, features: int, inputs: int) -> torch.Tensor:
    """The published layout again: exactly the packed bf16 values, or what the codes stand for, rounded to bf16.

    Args:
        packed: [E, F', K'] bf16, or e4m3 with ``scale``.
        scale: [E, F'] float32, or None.
        features: F before padding.
        inputs: K before padding.

    Returns:
        [E * F, K] bf16.
    """
    values = packed if scale is None else dequantize(packed, scale).bfloat16()
    return values[:, :features, :inputs].flatten(0, 1)
