"""Inputs of the self-checks, the same for every kernel of an op, and what a check gives."""

from __future__ import annotations

import torch

from happyhorse_fast.ops.packing import pack_linear
from happyhorse_fast.ops.rmsnorm_qkv import rmsnorm_quantize

# Three experts, the last tile of each ragged in its content but not in its rows, as the fast model lays them out.
ROWS, CHANNELS, HEADS_Q, HEADS_KV, HEAD_DIM = 512, 640, 5, 1, 128

Compared = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""Name of a result -> (from the kernel, from the reference, allowed tile distance)."""


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal float32, the same in every process."""
    return torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))


def row_tiles() -> torch.Tensor:
    """[4, 3] int32: three experts, of 256, 128 and 128 rows."""
    starts = torch.arange(0, ROWS, 128, dtype=torch.int32)
    experts = torch.tensor([0, 0, 1, 2], dtype=torch.int32)
    return torch.stack([experts, starts, starts + 128], dim=1)


def ragged_tiles() -> torch.Tensor:
    """[5, 3] int32: three experts, of 200, 57 and 255 rows, two of which end in a tile that others' rows follow."""
    spans = [(0, 0, 128), (0, 128, 200), (1, 200, 257), (2, 257, 385), (2, 385, ROWS)]
    return torch.tensor(spans, dtype=torch.int32)


def inputs(fmt: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x, scale) of a product in a format: normalised rows; no scale in bf16."""
    x, scale = rmsnorm_quantize(
        draw(0, ROWS, CHANNELS),
        torch.zeros(3, CHANNELS, dtype=torch.float32),
        row_tiles(),
        out=fmt,
        backend="reference",
    )
    return x.to(device), None if fmt == "bf16" else scale.to(device)


def packed_weight(seed: int, features: int, fmt: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, scale) of three experts in a format."""
    # A factor per expert, so that one expert's scale used for all shows.
    experts = torch.tensor([1.0, 3.0, 0.3], dtype=torch.float32).repeat_interleave(features)[:, None]
    weight = (draw(seed, 3 * features, CHANNELS) * experts / CHANNELS**0.5).bfloat16()
    packed, scale = pack_linear(weight, 3, fmt)
    return packed.to(device), None if scale is None else scale.to(device)
