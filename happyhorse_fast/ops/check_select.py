"""The self-check of `select_blocks`, whose result is a map rather than numbers near others."""

from __future__ import annotations

from typing import Any

import torch

from happyhorse_fast.block_map import BlockMap, BlockSelector, Layout
from happyhorse_fast.ops.check_inputs import HEAD_DIM, HEADS_KV, HEADS_Q, Compared, draw
from happyhorse_fast.ops.select_blocks import select_blocks


def check_select(backend: str, device: torch.device, variant: str) -> Compared:
    """Maps of a backend on a device, q and k in a format, beside the reference's; nothing may differ."""
    # Small integers, whose scores are the same in any order of summation, and tie: the map must be the same exactly.
    layout = Layout(4, 250, 40, 60, align_frames=True, align_modalities=True)
    base = BlockMap.frame_window(layout, 2)
    q, k = (draw(s, layout.slots, h, HEAD_DIM).round() for s, h in ((15, HEADS_Q), (16, HEADS_KV)))
    # Blocks that differ by at most 2, so that the largest product, (2 * 128)^2 * 128, and its noise stay below 2^24.
    level = draw(17, len(q) // 128, 1, 1).round().clamp(-2, 2).repeat_interleave(128, dim=0)
    dtype = {"bf16": torch.bfloat16, "int8_qk": torch.int8, "fp8": torch.float8_e4m3fn}[variant]
    q, k = ((x + level).to(dtype) for x in (q, k))
    # Powers of two, so that sums are exact in any order.
    steps = 2.0 ** -(torch.arange(len(q) // 128) % 3).float()
    scales: dict[str, Any] = {"q_scale": steps, "k_scale": steps.flip(0)} if variant == "fp8" else {}
    if variant == "int8_qk":
        rows = 2.0 ** -(torch.arange(len(q) * HEADS_Q) % 3).float().view(-1, HEADS_Q)
        scales = {"q_scale": rows, "k_scale": steps.expand(HEADS_KV, -1).contiguous()}
    compared: Compared = {}
    for name, keep, mass in (("top-k", 3, None), ("top-p", None, 0.7)):
        results = []
        for where, how in ((device, backend), (torch.device("cpu"), "reference")):
            block_map = select_blocks(
                q.to(where),
                k.to(where),
                BlockSelector(layout, base, where),
                keep=keep,
                mass=mass,
                **{name: scale.to(where) for name, scale in scales.items()},
                backend=how,
            )
            full, ids = block_map.to_blocks()
            results.append((torch.where(full, -1, torch.where(ids >= 0, ids, -2)), block_map.order))
        compared[f"{name} blocks"] = (results[0][0], results[1][0], 0.0)
        compared[f"{name} order"] = (results[0][1], results[1][1], 0.0)
    return compared
