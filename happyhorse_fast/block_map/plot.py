"""A picture of a block map: what is computed, what is skipped, where frames and modalities lie."""

from __future__ import annotations

import os
from typing import Any

import torch

from happyhorse_fast import optional
from happyhorse_fast.block_map.bits import BLOCK
from happyhorse_fast.block_map.layout import Layout

# Cells along a side: about one per pixel of the axis; larger maps are averaged down to it.
CELLS = 640
COLOURS = {"full": "#1f4e79", "partial": "#f28e2b", "absent": "#f4f1ea"}


def plot(
    full: torch.Tensor,
    partial: torch.Tensor,
    title: str,
    target: Any,
    layout: Layout | None,
) -> Any:
    """See :meth:`BlockMap.plot`; ``full`` and ``partial`` are bool [R, S] of one head."""
    optional.require("matplotlib", "BlockMap.plot")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    axis, figure = target, None
    if target is None or isinstance(target, (str, os.PathLike)):
        figure = Figure(figsize=(7.4, 7.6), dpi=130, layout="constrained")
        axis = figure.subplots()
    colours = torch.tensor([matplotlib.colors.to_rgb(c) for c in COLOURS.values()])
    kinds = torch.stack([full, partial]).float().cpu()
    kinds = torch.cat([kinds, 1 - kinds.sum(dim=0, keepdim=True)])
    if max(kinds.shape[1:]) > CELLS:
        size = [min(n, CELLS) for n in kinds.shape[1:]]
        kinds = torch.nn.functional.interpolate(kinds[None], size=size, mode="area")[0]
    image = torch.einsum("kxy,kc->xyc", kinds, colours).clamp(0, 1)
    bottom, right = (BLOCK * size for size in full.shape)
    axis.imshow(image.numpy(), extent=(0, right, bottom, 0), interpolation="nearest", aspect="auto")
    if layout is not None:
        _draw_layout(axis, layout)
    n_full, n_partial = int(full.sum()), int(partial.sum())
    axis.set_xlabel("keys (tokens)")
    axis.set_ylabel("queries (tokens)")
    axis.set_title(title, fontsize=10, pad=18 if layout is not None else 6)
    names = {
        "full": f"full: {n_full:,}",
        "partial": f"partial: {n_partial:,}",
        "absent": f"skipped: {full.numel() - n_full - n_partial:,}",
    }
    axis.legend(
        handles=[Patch(facecolor=COLOURS[k], edgecolor="#888888", label=v) for k, v in names.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.09),
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    if target is not None and figure is not None:
        figure.savefig(target)
    return axis


def _draw_layout(axis: Any, layout: Layout) -> None:
    for f in range(1, layout.frames):
        for line in (axis.axhline, axis.axvline):
            line(f * layout.frame_slots, color="#ffffff", linewidth=0.35, alpha=0.55)
    spans = [
        ("video", 0, layout.audio_start),
        ("audio", layout.audio_start, layout.text_start),
        ("text", layout.text_start, layout.slots),
    ]
    for name, first, last in spans:
        if first == last:
            continue
        for line in (axis.axhline, axis.axvline):
            line(first, color="#c03028", linewidth=0.8)
        # Narrow spans sit beside each other: audio's name to the left of its start, text's to the right.
        side = {"video": "center", "audio": "right", "text": "left"}[name]
        where = {"video": (first + last) / 2, "audio": last, "text": first}[name]
        place = axis.get_xaxis_transform()  # along the data, and in shares of the axis's height
        axis.text(where, 1.01, f"{name} ", transform=place, ha=side, va="bottom", fontsize=8, color="#c03028")
