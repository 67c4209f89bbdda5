"""Linear weights in the layout of the `fp8_linear` ops, padded once."""

from __future__ import annotations

import torch

from happyhorse_fast.ops.quantize import DTYPES, e4m3_rows, hadamard, int8_rows

QUANTIZE = {"int8": int8_rows, "fp8": e4m3_rows}

CHUNK = 4096
"""Output channels quantised at a time: 84 MB of float32 at 5120 inputs, rather than 561 MB for an up projection."""


@torch.no_grad()  # a graph would hold float32 copies of the weight
def pack_linear(
    weight: torch.Tensor,
    experts: int,
    to: str = "bf16",
    *,
    pad_f_to: int = 128,
    pad_k_to: int = 1,
    through_hadamard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split by expert, pad with zeros, and quantise or cast.

    A zero row gives zero features, which both activations keep zero; a zero column multiplies them: padding is exact.
    An up projection of 27,304 features becomes 27,392, and the down projection behind it 13,652 -> 13,696 inputs.

    Args:
        weight: [E * F, K] as published, experts stacked along the output.
        experts: E.
        to: ``"bf16"``, or ``"int8"`` or ``"fp8"`` (e4m3) with one scale per output channel and expert.
        pad_f_to: F is padded to a multiple of it: 128 before an activation, 1 where the product is a residual.
        pad_k_to: K is padded to a multiple of it: 64 behind swiglu7, 128 behind gelu7, else 1.
        through_hadamard: Each 64 neighbouring inputs go through the Hadamard matrix before they become int8, as
            `quantize_rows` does to what is multiplied; K' is a multiple of 64.

    Returns:
        packed [E, F', K'] bf16 and None; or packed codes and their scale [E, F'] float32.

    Raises:
        ValueError: ``experts`` does not divide the rows, a multiple is below 1, there is no such format, or a Hadamard
            where it does not fit.
    """
    rows, inputs = weight.shape
    if experts < 1 or rows % experts:
        raise ValueError(f"experts must divide the {rows} rows of weight, got {experts}")
    for name, multiple in (("pad_f_to", pad_f_to), ("pad_k_to", pad_k_to)):
        if multiple < 1:
            raise ValueError(f"{name} must be at least 1, got {multiple}")
    if to not in DTYPES:
        raise ValueError(f"to must be one of {', '.join(map(repr, DTYPES))}; got {to!r}")
    if through_hadamard and to != "int8":
        raise ValueError(f'through_hadamard must be False unless to is "int8", got to={to!r}')
    features = rows // experts
    shape = (experts, features + -features % pad_f_to, inputs + -inputs % pad_k_to)
    packed = torch.zeros(shape, dtype=DTYPES[to], device=weight.device)
    published = weight.unflatten(0, (experts, features))
    if to == "bf16":
        packed[:, :features, :inputs] = published
        return packed, None
    scale = torch.ones(shape[:2], dtype=torch.float32, device=weight.device)
    for first in range(0, features, CHUNK):
        part = slice(first, min(first + CHUNK, features))
        values = published[:, part]
        if through_hadamard:
            values = hadamard(torch.nn.functional.pad(values.float(), (0, shape[2] - inputs)))
        packed[:, part, : values.shape[2]], scale[:, part] = QUANTIZE[to](values)
    return packed, scale
