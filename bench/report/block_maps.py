"""The picture of what attention computes, skips, and masks inside a block."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from bench.cases import FULL_SIZES
from bench.report.style import FAINT, INK, blank_figure
from happyhorse_fast.block_map import BLOCK, BlockMap, Layout
from happyhorse_fast.eager.rotary import apply_rotary, frequency_bands, rotary_phases
from happyhorse_fast.eager.sequence import Clip, coordinates

SIZE = FULL_SIZES[0]
CONFIG = SIZE.config


def block_maps() -> Figure:
    """The trained window, a quarter of the video blocks by pooled score, and 3D tiles; one clip of 1080p, 5 s."""
    grid = SIZE.grid
    layout = Layout(grid.frames, grid.frame_tokens, grid.audio, grid.text, align_frames=True, align_modalities=True)
    dense = BlockMap.frame_window(layout, None)
    video_blocks = -(-layout.audio_start // BLOCK)
    q = _positions_alone(layout, grid)
    window = CONFIG.frame_receptive_field
    maps = {
        f"trained window: frames within {window}": BlockMap.frame_window(layout, window),
        "top 25 % of video blocks, by position alone": BlockMap.top_k(q, q, layout, video_blocks // 4, base=dense),
        "tiles: 6 frames, 8 rows, 60 columns": BlockMap.tile_window(layout, grid.columns, (1, 1, 1), (6, 8, 60), dense),
    }
    note = (
        "blocks of 128 x 128 tokens. The choice in the middle depends on q and k; here every token has the same ones, "
        "so the rotary position decides alone"
    )
    figure = blank_figure(14, 5.9, "Block maps of the 15B model, 1080p, 5 s", note)
    for axes, (name, block_map) in zip(figure.subplots(1, 3), maps.items(), strict=True):
        block_map.plot(axes, layout=layout)
        axes.set_title(f"{name}\n{axes.get_title()}", fontsize=9.5, color=INK, pad=20)
        axes.tick_params(labelsize=7.5, colors=FAINT)
    return figure


def _positions_alone(layout: Layout, grid: Clip) -> torch.Tensor:
    """[slots, 1, D]: one vector for every token, rotated to the token's place."""
    coords = coordinates(grid, CONFIG.coords_style)
    token = torch.ones(len(coords), 1, CONFIG.head_dim)
    rotated = apply_rotary(token, rotary_phases(coords, frequency_bands(CONFIG.head_dim)))
    rows = torch.cat([torch.arange(*span) for span in (*layout.frame_spans(), *layout.prefix_spans())])
    out = torch.zeros(layout.slots, 1, CONFIG.head_dim)
    out[rows] = rotated
    return out.bfloat16()
