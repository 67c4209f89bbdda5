"""Masks of one block as bits: 128 queries x 4 words of 32 keys."""

from __future__ import annotations

import torch

BLOCK = 128
"""Queries and keys of one block."""
WORDS = BLOCK // 32
"""int32 words that hold one query's keys of a block."""


def unpack(mask_bits: torch.Tensor) -> torch.Tensor:
    """int32 [masks, 128, 4] -> bool [masks, 128, 128]."""
    shift = torch.arange(32, dtype=torch.int32, device=mask_bits.device)
    return ((mask_bits.unsqueeze(-1) >> shift) & 1).flatten(2).bool()


def pack(masks: torch.Tensor) -> torch.Tensor:
    """bool [masks, 128, 128] -> int32 [masks, 128, 4]."""
    weight = torch.ones((), dtype=torch.int64, device=masks.device) << torch.arange(32, device=masks.device)
    words = (masks.unflatten(-1, (WORDS, 32)).long() * weight).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
