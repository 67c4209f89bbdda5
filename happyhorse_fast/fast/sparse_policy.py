"""From a training-free sparsity policy to the block map of one layer at one step."""

from __future__ import annotations

import torch

from happyhorse_fast.block_map import BlockMap, BlockSelector
from happyhorse_fast.fast.attention_inputs import AttentionInputs
from happyhorse_fast.fast.config import Sparsity, Tiles, TopK
from happyhorse_fast.fast.padded_rows import PaddedRows
from happyhorse_fast.ops import select_blocks


class SparsePolicy:
    """Makes a layer's sparse map within its exact one; all that does not depend on q and k is made once per clip.

    Args:
        policy: What to keep.
        exact: The layer's exact map: dense, or the trained window.
        rows: Where tokens sit.
        columns: Token columns of a frame, which ``Tiles`` needs; None where they are not known.

    Raises:
        ValueError: ``Tiles`` without them.
    """

    def __init__(self, policy: Sparsity, exact: BlockMap, rows: PaddedRows, columns: int | None) -> None:
        self.policy = policy
        self.static: BlockMap | None = None
        if isinstance(policy, Tiles):
            if rows.layout is None or columns is None:
                raise ValueError("sparsity must be TopK or TopP where a frame's token columns are not known, got Tiles")
            window = (policy.frames, policy.rows, policy.columns)
            self.static = BlockMap.tile_window(rows.layout, columns, (1, 1, 1), window, exact)
            return
        self.selector = BlockSelector(rows, exact, exact.device)
        self.video_blocks = -(-rows.starts[1] // 128)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its tensors on the device."""
        if self.static is not None:
            return self.static.tensors()
        return *self.selector.base.tensors(), *self.selector.tensors()

    def map(self, x: AttentionInputs, backend: str) -> BlockMap:
        """The map for the queries and keys of ``x``; ``backend``: of :func:`happyhorse_fast.ops.select_blocks`."""
        if self.static is not None:
            return self.static
        keep = mass = None
        if isinstance(self.policy, TopK):
            keep = max(1, round(self.policy.keep * self.video_blocks))
        else:
            assert not isinstance(self.policy, Tiles)
            mass = self.policy.mass
        return select_blocks(
            x.q, x.k, self.selector, keep=keep, mass=mass, q_scale=x.q_scale, k_scale=x.k_scale, backend=backend
        )
