"""The block map: tensors that the attention kernel walks, and questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from happyhorse_fast.block_map.assemble import assemble
from happyhorse_fast.block_map.bits import BLOCK, WORDS, unpack
from happyhorse_fast.block_map.dense import dense
from happyhorse_fast.block_map.dynamic import Parts, amount, candidates, choose
from happyhorse_fast.block_map.flex import from_flex, to_flex
from happyhorse_fast.block_map.from_ranges import Ranges, from_ranges
from happyhorse_fast.block_map.layout import Layout, frame_window
from happyhorse_fast.block_map.plot import plot
from happyhorse_fast.block_map.tiles import tile_window


@dataclass(frozen=True, eq=False)  # by identity: tensors have no truth value
class BlockMap:
    """Per block of 128 queries, the blocks of 128 keys it attends to: compressed rows, full blocks first.

    Row (h, r) holds ``columns[starts[h, r] : starts[h, r] + counts[h, r, 1]]``; the first ``counts[h, r, 0]`` of them
    are full, the others partial with the bits ``mask_bits[mask_ids[...]]``. Columns ascend within each of the two.
    Hm is 1 (one map for all heads) or the number of key/value heads. R = ceil(queries / 128), S = ceil(keys / 128).

    What every constructor keeps, and :meth:`validate` checks: a full block has all of its 128 keys (the last, ragged
    block of keys is always partial), so the kernel's hot loop needs neither a mask nor a bounds check; rows lie one
    after another (``starts`` never falls); ``columns`` may be longer than the rows need (a map made on the device has
    a fixed capacity).

    Attributes:
        counts: int32 [Hm, R, 2]: full blocks, all blocks.
        starts: int32 [Hm, R].
        columns: int32 [nnz].
        mask_ids: int32 [nnz], -1 for a full block.
        mask_bits: int32 [masks, 128, 4], no two alike: key 32 * w + b of query i is bit b of word [i, w].
        order: int32 [Hm * R]: rows h * R + r, longest first; equal lengths keep their order, for locality.
        queries: Query tokens N.
        keys: Key tokens M.
    """

    counts: torch.Tensor
    starts: torch.Tensor
    columns: torch.Tensor
    mask_ids: torch.Tensor
    mask_bits: torch.Tensor
    order: torch.Tensor
    queries: int
    keys: int

    # Sources --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_ranges(cls, q_ranges: Ranges, k_ranges: Ranges, queries: int, keys: int) -> BlockMap:
        """Exactly the union of q_ranges[i] x k_ranges[i]: overlaps count once, in any order, empty ranges too.

        Args:
            q_ranges: [rows, 2] of (start, end), half open, in any order.
            k_ranges: [rows, 2], paired with ``q_ranges``.
            queries: Query tokens N.
            keys: Key tokens M.

        Raises:
            ValueError: A range is reversed or leaves its tokens (the message names the row), the lengths differ, or
                there are more tokens or blocks than int32 numbers.
        """
        return cls(*from_ranges(q_ranges, k_ranges, queries, keys))

    @classmethod
    def dense(cls, queries: int, keys: int, device: torch.device | str | None = None) -> BlockMap:
        """Every query attends to every key.

        Raises:
            ValueError: A number of tokens is negative.
        """
        return cls(*dense(queries, keys, device))

    @classmethod
    def frame_window(cls, layouts: Layout | Sequence[Layout], receptive_field: int | None) -> BlockMap:
        """Video sees frames f-R..f+R, audio and text; audio and text see everything of their clip.

        Args:
            layouts: Where each clip's tokens lie; clips follow each other in one sequence.
            receptive_field: R >= 0, or None for no window.

        Raises:
            TypeError: No Layout.
            ValueError: R is negative, or there is no layout.
        """
        q_ranges, k_ranges, slots = frame_window(layouts, receptive_field)
        return cls.from_ranges(q_ranges, k_ranges, slots, slots)

    @classmethod
    def tile_window(
        cls,
        layout: Layout,
        columns: int,
        tile: tuple[int, int, int],
        window: tuple[int, int, int],
        base: BlockMap | None = None,
    ) -> BlockMap:
        """Approximate: blocks of tokens in tile order (:func:`tile_order`) whose 3D tiles are at most ``window`` apart.

        Args:
            layout: Where the clip's tokens lie.
            columns: Token columns of a frame; rows follow from the layout.
            tile: Tokens of a tile along (t, h, w).
            window: Largest distance, in tiles, along (t, h, w).
            base: The exact map to stay within; dense where None.

        Raises:
            TypeError: No Layout, or not three sizes.
            ValueError: A size is out of range.
        """
        keep = tile_window(layout, columns, tile, window)
        return (cls.frame_window(layout, None) if base is None else base).select(keep[None])

    @classmethod
    def top_k(cls, q: torch.Tensor, k: torch.Tensor, layout: Layout, keep: int, **options: Any) -> BlockMap:
        """Approximate, per key/value head: the ``keep`` blocks of largest pooled score; see `ops.select_blocks`."""
        return cls._chosen(q, k, layout, keep=keep, **options)

    @classmethod
    def top_p(cls, q: torch.Tensor, k: torch.Tensor, layout: Layout, mass: float, **options: Any) -> BlockMap:
        """Approximate, per key/value head: blocks up to a share of the pooled softmax; see `ops.select_blocks`."""
        return cls._chosen(q, k, layout, mass=mass, **options)

    @classmethod
    def _chosen(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        base: BlockMap | None = None,
        *,
        keep: int | None = None,
        mass: float | None = None,
        pool: str = "max",
        q_scale: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
    ) -> BlockMap:
        base = (cls.frame_window(layout, None) if base is None else base).to(q.device)
        counts = amount(q, k, base.keys, keep, mass, pool)
        tensors = candidates(layout, *base.to_blocks(), base.queries, base.keys)
        return base.within(choose(q, k, *tensors, q_scale, k_scale, *counts, pool == "mean"))

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockMap:
        """From FlexAttention's BlockMask; partial blocks are evaluated once, to bits, through its ``mask_mod``.

        Raises:
            ValueError: Its block size is not 128, or its batch is not 1.
        """
        return cls(*from_flex(block_mask))

    def to_flex(self, num_heads_q: int | None = None) -> Any:
        """FlexAttention's BlockMask of the same pairs.

        Args:
            num_heads_q: Query heads; needed where the map has one row set per key/value head.

        Raises:
            ValueError: ``num_heads_q`` is missing or no multiple of the map's heads.
        """
        return to_flex(*self.to_blocks(), self.mask_bits, self.queries, self.keys, num_heads_q)

    # Questions ------------------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        """Hm: 1, or the number of key/value heads."""
        return self.counts.shape[0]

    @property
    def rows(self) -> int:
        """R: blocks of 128 queries."""
        return -(-self.queries // BLOCK)

    @property
    def key_blocks(self) -> int:
        """S: blocks of 128 keys."""
        return -(-self.keys // BLOCK)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.counts.device

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(counts, starts, columns, mask_ids, mask_bits, order): what the op takes."""
        return self.counts, self.starts, self.columns, self.mask_ids, self.mask_bits, self.order

    def to(self, device: torch.device | str) -> BlockMap:
        """A copy on another device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)[:6]})

    def select(self, keep: torch.Tensor) -> BlockMap:
        """The blocks that ``keep`` names, on this map's device; a block's own mask stays as it was.

        Args:
            keep: bool [Hm, R, S], on any device.

        Raises:
            ValueError: This map has several heads, or the shapes do not fit.
        """
        if self.heads != 1 or keep.shape[1:] != (self.rows, self.key_blocks):
            raise ValueError(
                f"keep must be [Hm, {self.rows}, {self.key_blocks}] over a base of one head, "
                f"got {list(keep.shape)} over {self.heads}"
            )
        keep = keep.to(self.device)
        full, ids = self.to_blocks()
        return BlockMap(*assemble(keep & full, torch.where(keep, ids, -1), self.mask_bits, self.queries, self.keys))

    def within(self, parts: Parts) -> BlockMap:
        """The map of blocks that were chosen among this one's (`dynamic.choose`), with its masks."""
        counts, starts, columns, mask_ids, order = parts
        return replace(self, counts=counts, starts=starts, columns=columns, mask_ids=mask_ids, order=order)

    def blocks(self) -> tuple[int, int]:
        """(full, partial) blocks over all rows and heads of the map."""
        full, both = (int(n) for n in self.counts.long().sum(dim=(0, 1)))
        return full, both - full

    def pairs(self) -> int:
        """Unmasked (query, key) pairs over all heads of the map: attention does 4 * D FLOPs on each, per query head."""
        entry, row, full = self.entries()
        valid = (self.queries - row % max(self.rows, 1) * BLOCK).clamp(max=BLOCK)  # queries that the block really has
        total = int(valid[full].sum()) * BLOCK
        ids = self.mask_ids[entry][~full].long()
        per_row = unpack(self.mask_bits).sum(dim=-1, dtype=torch.int64)  # [masks, 128]
        upto = torch.nn.functional.pad(per_row.cumsum(dim=1), (1, 0))  # keys seen by the first n queries
        return total + int(upto[ids, valid[~full]].sum())

    def density(self) -> float:
        """Share of all query-key pairs that is computed usefully; 1.0 for a dense map."""
        everything = self.heads * self.queries * self.keys
        return self.pairs() / everything if everything else 0.0

    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(index into ``columns`` [n], row h * R + r [n], whether full [n]) of every block that is in use."""
        entry = torch.arange(len(self.columns), device=self.device)
        starts = self.starts.flatten().long()
        if not len(starts):
            return entry[:0], entry[:0], entry[:0] > 0
        row = (torch.searchsorted(starts, entry, right=True) - 1).clamp(min=0)
        place, counts = entry - starts[row], self.counts.flatten(0, 1).long()[row]
        used = place < counts[:, 1]
        return entry[used], row[used], (place < counts[:, 0])[used]

    def to_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(full bool [Hm, R, S], mask id int32 [Hm, R, S] with -1 where not partial)."""
        shape = (self.heads, self.rows, self.key_blocks)
        full = torch.zeros(shape, dtype=torch.bool, device=self.device)
        ids = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        entry, row, is_full = self.entries()
        place = row * self.key_blocks + self.columns[entry].long()
        full.view(-1)[place[is_full]] = True
        ids.view(-1)[place[~is_full]] = self.mask_ids[entry][~is_full]
        return full, ids

    def to_dense(self) -> torch.Tensor:
        """bool [Hm, queries, keys]; for small sizes: tests and pictures."""
        full, ids = self.to_blocks()
        table = torch.cat([unpack(self.mask_bits), torch.ones(1, BLOCK, BLOCK, dtype=torch.bool, device=self.device)])
        table = torch.cat([table, torch.zeros_like(table[:1])])
        which = torch.where(full, len(table) - 2, torch.where(ids >= 0, ids, len(table) - 1)).long()
        tiles = table[which].permute(0, 1, 3, 2, 4)  # [Hm, R, 128, S, 128]
        return tiles.flatten(3, 4).flatten(1, 2)[:, : self.queries, : self.keys]

    def validate(self) -> None:
        """Check every promise of this class; waits for the device.

        Raises:
            ValueError: The first one that does not hold, with what was found.
        """
        rows, width = self.heads * self.rows, self.key_blocks
        wanted = {
            "counts": (self.heads, self.rows, 2),
            "starts": (self.heads, self.rows),
            "mask_ids": tuple(self.columns.shape),
            "mask_bits": (len(self.mask_bits), BLOCK, WORDS),
            "order": (rows,),
        }
        for field in fields(self)[:6]:
            value = getattr(self, field.name)
            if value.dtype != torch.int32 or value.device != self.device or not value.is_contiguous():
                raise ValueError(
                    f"{field.name} must be contiguous int32 on {self.device}, got {value.dtype} on {value.device}"
                )
            if tuple(value.shape) != wanted.get(field.name, tuple(value.shape)):
                raise ValueError(f"{field.name} must be of shape {wanted[field.name]}, got {tuple(value.shape)}")
        counts, starts = self.counts.flatten(0, 1).long(), self.starts.flatten().long()
        if bool(((counts[:, 0] > counts[:, 1]) | (counts < 0).any(dim=1) | (counts[:, 1] > width)).any()):
            raise ValueError(f"counts must satisfy 0 <= full <= all <= {width} blocks, got {counts.tolist()}")
        ends = starts + counts[:, 1]
        if rows and (bool((starts[1:] < ends[:-1]).any()) or int(starts[0]) < 0 or int(ends[-1]) > len(self.columns)):
            raise ValueError(f"starts must hold rows one after another within {len(self.columns)} columns")
        if bool((self.order.long().sort().values != torch.arange(rows, device=self.device)).any()):
            raise ValueError(f"order must be a permutation of the {rows} rows")
        entry, row, full = self.entries()
        column, ids = self.columns[entry].long(), self.mask_ids[entry]
        if bool(((column < 0) | (column >= width)).any()):
            raise ValueError(f"columns must lie in 0..{width - 1}, got {int(column.min())}..{int(column.max())}")
        if len(torch.unique(row * width + column)) != len(column):
            raise ValueError("columns must name a block at most once per row")
        if bool((ids[full] != -1).any()) or bool(((ids[~full] < 0) | (ids[~full] >= len(self.mask_bits))).any()):
            raise ValueError(
                f"mask_ids must be -1 for full blocks and in 0..{len(self.mask_bits) - 1} for partial ones"
            )
        if self.keys % BLOCK:
            if bool((full & (column == width - 1)).any()):
                raise ValueError(f"the last block of keys has {self.keys % BLOCK} of 128 keys, so it must be partial")
            past = unpack(self.mask_bits)[:, :, self.keys % BLOCK :].any(dim=(1, 2))
            if bool(past[ids[(~full) & (column == width - 1)].long()].any()):
                raise ValueError(f"mask_bits of the last block of keys must be 0 past key {self.keys}")

    def plot(self, target: Any = None, *, layout: Layout | None = None, head: int = 0) -> Any:
        """Draw the map; needs matplotlib.

        Args:
            target: Path of a picture to write, a matplotlib axis to draw on, or None for a new figure.
            layout: Draws the boundaries of frames and modalities where given.
            head: Which of the map's heads.

        Returns:
            The matplotlib axis.
        """
        if not 0 <= head < self.heads:
            raise ValueError(f"head must be in 0..{self.heads - 1}, got {head}")
        full, ids = self.to_blocks()
        of_head, of_all = (f", head {head} of {self.heads}", " over all heads") if self.heads > 1 else ("", "")
        computed = int(self.counts[head, :, 1].sum()) / max(self.rows * self.key_blocks, 1)
        title = (
            f"{self.queries:,} queries x {self.keys:,} keys{of_head}\n"
            f"{computed:.1%} of blocks computed, {self.density():.1%} of pairs useful{of_all}"
        )
        return plot(full[head], ids[head] >= 0, title, target, layout)
