"""What attention takes of the QKV product, and the operand that a product takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

Operand = tuple[torch.Tensor, torch.Tensor | None]
"""[rows, K] in bf16 and None, or codes and their scale."""


class AttentionInputs(NamedTuple):
    """Results of the QKV product, as attention takes them.

    Attributes:
        q: [rows, Hq, D].
        k: [rows, Hkv, D].
        v: [rows, Hkv, D]; in e4m3 as docs/OPS.md lays it out.
        q_scale: Of codes; None in bf16.
        k_scale: Likewise.
        v_scale: Of e4m3 codes.
        gate: [rows, Hq] float32 after its sigmoid.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    gate: torch.Tensor
