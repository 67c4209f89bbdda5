"""Let a sparsity policy choose between latent frames of the pony's clip.

At 1080p a latent frame is 16 blocks of 128 tokens, and a policy leaves most of them out. A clip of the pony is two
blocks in all. Here every latent frame sits in a block of its own, as aligned frames of the full model do, the policy
chooses there, and what it chose is brought back to the clip's own rows as masks inside blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from happyhorse_fast.block_map import BLOCK, BlockMap
from happyhorse_fast.block_map.assemble import assemble
from happyhorse_fast.block_map.bits import pack
from happyhorse_fast.eager import sequence
from happyhorse_fast.fast.attention import AttentionInputs
from happyhorse_fast.fast.clip_state import ClipState, SparsePolicy
from happyhorse_fast.fast.padded_rows import PaddedRows
from happyhorse_fast.fast.state import FastState, build_clip_state
from happyhorse_fast.pony.generate import CLIP


class FramePolicy(SparsePolicy):
    """A policy that chooses in rows with every latent frame on a block, for a clip in its own rows.

    Args:
        chooser: The policy of those rows.
        wide: The clip in them.
        state: The clip in its own rows.
    """

    def __init__(self, chooser: SparsePolicy, wide: ClipState, state: ClipState) -> None:
        self.chooser, self.wide, self.state = chooser, wide, state

    def map(self, x: AttentionInputs, backend: str) -> BlockMap:
        """Choose a map from q and k [rows, heads, D] in bf16, a latent frame at a time.

        Raises:
            ValueError: q and k are codes, whose scales belong to other blocks.
        """
        if x.q_scale is not None or x.k_scale is not None:
            raise ValueError("attention must be bf16 where sparsity decides between frames, got codes with scales")
        wide = x._replace(q=self._spread(x.q), k=self._spread(x.k))
        tokens = self.wide.token_rows
        kept = self.chooser.map(wide, backend).to_dense()[:, tokens[:, None], tokens]
        rows, place = self.state.rows.slots, self.state.token_rows
        mask = torch.zeros(len(kept), rows, rows, dtype=torch.bool)
        mask[:, place[:, None], place] = kept
        tiles = mask.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)  # [Hm, R, S, 128, 128]
        used = tiles.any(dim=(3, 4))  # full ones too have a mask, of ones
        ids = torch.full(used.shape, -1, dtype=torch.int32)
        ids[used] = torch.arange(int(used.sum()), dtype=torch.int32)
        return BlockMap(*assemble(torch.zeros_like(used), ids, pack(tiles[used]), rows, rows))

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(self.wide.rows.slots, *x.shape[1:])
        out[self.wide.token_rows] = x[self.state.token_rows]
        return out


def decide_between_frames(model: Any) -> None:
    """Make an accelerated pony, on the CPU, choose its sparse masks a latent frame at a time."""
    fast: FastState = model.fast
    clip, bands = CLIP, model.adapter.rope.bands
    state = fast.clips[clip] = build_clip_state(fast, clip, bands)
    wide = ClipState.build(
        PaddedRows.of(clip, windowed=True, most_padding=math.inf),
        sequence.dense_ranges(clip),
        sequence.local_ranges(clip, fast.config.frame_receptive_field),
        sequence.coordinates(clip, fast.config.coords_style),
        bands,
        fast.fast,
        clip.columns,
    )
    state.policies = {which: FramePolicy(chooser, wide, state) for which, chooser in wide.policies.items()}
