"""State that depends on a clip's shape alone, made once: layout, rotary phases, row tiles, block maps."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector
from happyhorse_fast.eager.rotary import rotary_phases
from happyhorse_fast.eager.sequence import Ranges
from happyhorse_fast.fast.attention import AttentionInputs
from happyhorse_fast.fast.config import FastConfig, Sparsity, Tiles, TopK, TopP
from happyhorse_fast.fast.padded_rows import PaddedRows
from happyhorse_fast.fast.plan import LayerPlan
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.qkv.packing import pack_cos_sin
from happyhorse_fast.parallel.group import Ranks
from happyhorse_fast.parallel.rows import RowShare
from happyhorse_fast.parallel.ulysses import Ulysses

Span = tuple[int, int, int]
"""(experts, first row, end row) of a table of row tiles, of those that this rank holds."""


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
        keep = max(1, round(self.policy.keep * self.video_blocks)) if isinstance(self.policy, TopK) else None
        mass = self.policy.mass if isinstance(self.policy, TopP) else None
        return select_blocks(
            x.q, x.k, self.selector, keep=keep, mass=mass, q_scale=x.q_scale, k_scale=x.k_scale, backend=backend
        )


@dataclass
class ClipState:
    """Everything a forward pass needs beside weights and latents; threads share it, so no forward pass changes it.

    Attributes:
        rows: Where tokens sit.
        share: The rows that this process holds: all, or a rank's.
        token_rows: [N] int64 row of every token, counted from the first that is held here.
        cos_sin: [rows held, D] float32, see docs/OPS.md; padding rows do not rotate.
        dense: Map of the layers without a window.
        local: Map of the layers with one; the same object where the clip is below the window's size.
        policies: What makes sparse maps within ``dense`` (True) and ``local`` (False), where there is a policy.
        tiles: [tiles, 3] int32 tables of :meth:`PaddedRows.row_tiles` by (experts, first row, end row): of all rows
            held, and of those that are in the MLP at once.
        ulysses: How ranks exchange rows for heads, where several share the sequence.
    """

    rows: PaddedRows
    share: RowShare
    token_rows: torch.Tensor
    cos_sin: torch.Tensor
    dense: BlockMap
    local: BlockMap
    policies: dict[bool, SparsePolicy] = field(default_factory=dict)
    tiles: dict[Span, torch.Tensor] = field(default_factory=dict)
    ulysses: Ulysses | None = None

    @classmethod
    def build(
        cls,
        rows: PaddedRows,
        dense: Ranges,
        local: Ranges | None,
        coords: torch.Tensor,
        bands: torch.Tensor,
        fast: FastConfig,
        columns: int | None = None,
        ranks: Ranks | None = None,
    ) -> ClipState:
        """Compute the state of one clip; waits for the device, so that no forward pass does.

        Args:
            rows: Where tokens sit.
            dense: Attention ranges over tokens of layers without a window.
            local: Of layers with one; None where none applies.
            coords: [N, 9] float32.
            bands: [B].
            fast: The acceleration's configuration.
            columns: Token columns of a frame, where the sequence is one clip.
            ranks: That share the sequence; None for one process.

        Raises:
            ValueError: ``sparsity`` is ``Tiles`` and the sequence is not one clip.
        """
        device = coords.device
        share = RowShare(rows.slots, BLOCK, *((1, 0) if ranks is None else (ranks.size, ranks.rank)))
        token_rows = rows.token_rows(device) - share.first
        here = (token_rows >= 0) & (token_rows < share.count)
        rotation = pack_cos_sin(rotary_phases(coords[here], bands))
        cos_sin = torch.zeros(share.count, rotation.shape[1], dtype=torch.float32, device=device)
        cos_sin[:, : rotation.shape[1] // 2] = 1.0
        cos_sin[token_rows[here]] = rotation
        dense_map = BlockMap.from_ranges(*rows.to_rows(dense), rows.slots, rows.slots).to(device)
        local_map = dense_map
        if local is not None:
            local_map = BlockMap.from_ranges(*rows.to_rows(local), rows.slots, rows.slots).to(device)
        policies = {}
        if fast.sparsity is not None:
            # One per exact map: the two differ only where the clip has a window.
            exact = {exact_map is dense_map: exact_map for exact_map in (dense_map, local_map)}
            policies = {which: SparsePolicy(fast.sparsity, exact[which], rows, columns) for which in exact}
        part = fast.rows_in_mlp or share.count
        spans = {(0, share.count), *((first, min(first + part, share.count)) for first in range(0, share.count, part))}
        ulysses = None if ranks is None else Ulysses(ranks, share)
        made = cls(rows, share, token_rows, cos_sin, dense_map, local_map, policies, ulysses=ulysses)
        made.tiles = {(experts, *span): made.row_tiles(experts, *span) for experts in (1, 3) for span in spans}
        return made

    def fake(self, device: torch.device | str) -> ClipState:
        """The same shapes on a device that need not exist; to be called under a FakeTensorMode."""
        likes = {id(x): torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in self.tensors()}
        return copy.deepcopy(self, likes)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.token_rows.device

    def tensors(self) -> list[torch.Tensor]:
        """Everything that takes memory on the device."""
        policies = (x for policy in self.policies.values() for x in policy.tensors())
        maps = (*self.dense.tensors(), *self.local.tensors())
        return [self.token_rows, self.cos_sin, *maps, *policies, *self.tiles.values()]

    def row_tiles(self, experts: int, first: int = 0, end: int | None = None) -> torch.Tensor:
        """:meth:`PaddedRows.row_tiles` of rows held; made anew for those that :attr:`tiles` has no table of."""
        end = self.share.count if end is None else end
        table = self.tiles.get((experts, first, end))
        start = self.share.first
        return self.rows.row_tiles(experts, start + first, start + end, self.device) if table is None else table

    def held(self, modality: int) -> slice:
        """Of the tokens of a modality those whose rows are held here."""
        return self.rows.held(modality, self.share)

    def every_row(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows held, ...] -> [rows, ...] of all ranks, in the order of ``token_rows + share.first``."""
        if self.ulysses is None:
            return hidden
        held = self.share.held()
        return self.ulysses.ranks.gather(hidden[: held[self.share.rank]], held)

    def every_token(self, out: torch.Tensor, modality: int) -> torch.Tensor:
        """[tokens held, ...] of a modality -> those of all ranks, in order."""
        if self.ulysses is None:
            return out
        slices = [self.rows.held(modality, self.share.of(rank)) for rank in range(self.share.ranks)]
        return self.ulysses.ranks.gather(out, [part.stop - part.start for part in slices])

    def block_map(self, plan: LayerPlan, x: AttentionInputs, *, exact: bool = False) -> BlockMap:
        """The layer's block map: the exact one, or what the sparsity policy makes of it from q and k.

        ``exact``: whether the policy does not apply at this denoising step.
        """
        whole = self.local if plan.local else self.dense
        if exact or not plan.sparse:
            return whole
        return self.policies[whole is self.dense].map(x, plan.backend["select_blocks"])
