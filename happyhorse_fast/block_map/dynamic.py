"""Block maps chosen by what q and k hold: made on the device, in tensor operations, without waiting for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch

from happyhorse_fast import ambient
from happyhorse_fast.block_map.assemble import assemble
from happyhorse_fast.block_map.bits import BLOCK
from happyhorse_fast.block_map.layout import Layout, frame_window
from happyhorse_fast.block_map.map import BlockMap
from happyhorse_fast.errors import real_number, require_whole

FULL, ABSENT = -1, -2
"""Entries of a selector's ``table`` that name no mask."""
WEIGHT_BITS = 30
"""A block's softmax weight is an integer, 2^30 for the best: sums are exact in any order, 11 bits more hold 2048."""
MASS_BITS = 20
"""``mass`` counts in steps of 2^-20: 41 + 20 bits of a sum times a mass stay within int64."""

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""(counts, starts, columns, mask_ids, order) of a map; see :class:`BlockMap`."""


class Slots(Protocol):
    """Where a sequence's tokens lie: a :class:`Layout`, or what else says the same."""

    @property
    def slots(self) -> int: ...

    def frame_spans(self) -> list[tuple[int, int]]: ...

    def prefix_spans(self) -> list[tuple[int, int]]: ...


@ambient.makes_tensors
def touching(spans: Sequence[tuple[int, int]], blocks: int) -> torch.Tensor:
    """bool [blocks]: which blocks hold a token of a span."""
    held = torch.zeros(blocks, dtype=torch.bool)
    for start, end in spans:
        if start < end:
            held[start // BLOCK : (end - 1) // BLOCK + 1] = True
    return held


def select(base: BlockMap, keep: torch.Tensor) -> BlockMap:
    """The blocks of ``base`` that ``keep`` names, on its device; a block's own mask stays as it was.

    Args:
        base: A map with Hm = 1.
        keep: bool [Hm, R, S], on any device.

    Raises:
        ValueError: ``base`` has several heads, or the shapes do not fit.
    """
    if base.heads != 1 or keep.shape[1:] != (base.rows, base.key_blocks):
        raise ValueError(
            f"keep must be [Hm, {base.rows}, {base.key_blocks}] over a base of one head, "
            f"got {list(keep.shape)} over {base.heads}"
        )
    keep = keep.to(base.device)
    full, ids = base.to_blocks()
    return assemble(keep & full, torch.where(keep, ids, -1), base.mask_bits, base.queries, base.keys)


class BlockSelector:
    """What a clip's dynamic maps have in common, made once: then every map is a few launches and no host work.

    Blocks that hold audio or text are kept in every row and are dense as queries; padding slots are never keys and
    weigh nothing in the means.

    Args:
        layout: Where the clip's tokens lie.
        base: The exact map to stay within, such as the frame window; every token of a :class:`Layout` where None.
        device: Where q and k are.

    Attributes:
        base: The exact map, on the device.
        table: int32 [R, S]: the mask id of a partial block of ``base``, FULL or ABSENT.
        prefix: int8 [S]: 1 for a block that holds audio or text.
        live: int8 [S * 128]: 1 for a slot that holds a token.
        inverse: float32 [S]: 1 / tokens of the block, 0 where it has none.

    Raises:
        ValueError: ``base`` is of another size than the layout, has several heads, or is missing.
    """

    @ambient.makes_tensors
    def __init__(self, layout: Slots, base: BlockMap | None, device: torch.device | str) -> None:
        if base is None:
            if not isinstance(layout, Layout):
                raise ValueError(f"base must be given for a layout of type {type(layout).__name__}")
            base = frame_window(layout, None)
        if (base.queries, base.keys) != (layout.slots, layout.slots):
            raise ValueError(f"base must have the layout's {layout.slots} slots, got {base.queries} x {base.keys}")
        if base.heads != 1:
            raise ValueError(f"base must be one map for all heads, got one for each of {base.heads}")
        self.base = base.to(device)
        full, ids = (t[0] for t in self.base.to_blocks())
        self.table = torch.where(full, FULL, torch.where(ids >= 0, ids, ABSENT)).to(torch.int32)
        self.prefix = touching(layout.prefix_spans(), base.rows).to(device, torch.int8)
        live = torch.zeros(base.rows * BLOCK, dtype=torch.int8)
        for start, end in layout.frame_spans() + layout.prefix_spans():
            live[start:end] = 1
        self.live = live.to(device)
        tokens = live.view(base.rows, BLOCK).sum(dim=1)
        self.inverse = torch.where(tokens > 0, 1 / tokens.clamp(min=1).float(), 0.0).to(device)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(table, prefix, live, inverse): what the choice needs besides q and k."""
        return self.table, self.prefix, self.live, self.inverse

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BlockSelector:
        """A copy with every tensor replaced by what ``change`` makes of it."""
        other = copy.copy(self)
        other.base = self.base.changed(change)
        other.table, other.prefix, other.live, other.inverse = map(change, self.tensors())
        return other

    def top_k(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        keep: int,
        *,
        pool: Literal["max", "mean"] = "max",
        q_scale: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
    ) -> BlockMap:
        """Per key/value head and row, the ``keep`` blocks of largest score, besides those that are always kept.

        Of equal scores the one of the lower block is the larger.

        Args:
            q: [N, Hq, D], bf16, float32, or codes.
            k: [N, Hkv, D].
            keep: Blocks of 128 keys per row, at least 1.
            pool: How the scores of a group's query heads become one.
            q_scale: float32 of codes: int8 [N, Hq], e4m3 [R].
            k_scale: float32 of codes: int8 [Hkv, S], e4m3 [S].

        Raises:
            ValueError: An argument is out of range or of the wrong shape.
        """
        amount = self.amount(q, k, keep, None, pool)
        return self.block_map(choose(q, k, *self.tensors(), q_scale, k_scale, *amount, pool == "mean"))

    def top_p(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        mass: float,
        *,
        pool: Literal["max", "mean"] = "max",
        q_scale: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
    ) -> BlockMap:
        """Per key/value head and row, the fewest blocks that hold ``mass`` of the softmax of the pooled scores.

        The softmax is over the blocks that are not always kept, in integers of 2^-30 of the best block's weight and at
        least 1, so that ``mass`` = 1 keeps every block; arguments as for :meth:`top_k`, 0 < mass <= 1.

        Raises:
            ValueError: An argument is out of range or of the wrong shape.
        """
        amount = self.amount(q, k, None, mass, pool)
        return self.block_map(choose(q, k, *self.tensors(), q_scale, k_scale, *amount, pool == "mean"))

    def block_map(self, parts: Parts) -> BlockMap:
        """The map of chosen blocks, within ``base`` and with its masks."""
        counts, starts, columns, mask_ids, order = parts
        base = self.base
        return BlockMap(counts, starts, columns, mask_ids, base.mask_bits, order, base.queries, base.keys)

    def amount(
        self, q: torch.Tensor, k: torch.Tensor, keep: int | None, mass: float | None, pool: str
    ) -> tuple[int, int]:
        """Check the arguments of a choice, and give (keep, mass in steps of 2^-20), one of the two being 0.

        Raises:
            ValueError: See :meth:`top_k` and :meth:`top_p`.
        """
        if (keep is None) == (mass is None):
            raise ValueError(f"exactly one of keep and mass must be given, got keep={keep} and mass={mass}")
        if keep is not None:
            keep = require_whole("keep", keep, 1)
        share = real_number(mass)
        if mass is not None and (share is None or not 0 < share <= 1):
            raise ValueError(f"mass must satisfy 0 < mass <= 1, got {mass}")
        if pool not in ("max", "mean"):
            raise ValueError(f'pool must be "max" or "mean", got {pool!r}')
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 3 or x.shape[0] != self.base.keys:
                raise ValueError(f"{name} must be [{self.base.keys}, heads, D], got {list(x.shape)}")
        if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
            raise ValueError(f"q must have a multiple of k's heads and its D, got {list(q.shape)} and {list(k.shape)}")
        if keep is not None:
            return min(keep, len(self.prefix)), 0
        assert share is not None
        return 0, max(1, round(share * 2**MASS_BITS))


@ambient.independent
def choose(
    q: torch.Tensor,
    k: torch.Tensor,
    table: torch.Tensor,
    prefix: torch.Tensor,
    live: torch.Tensor,
    inverse: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    keep: int,
    mass: int,
    mean: bool,
) -> Parts:
    """The blocks that a row keeps, in compressed rows: full ones first, then partial ones, ascending in each.

    Row h * R + r starts at (h * R + r) * S. What it does not keep follows what it keeps, with mask id -1.

    Args:
        q: [N, Hq, D].
        k: [N, Hkv, D].
        table: See :class:`BlockSelector`, as for ``prefix``, ``live`` and ``inverse``.
        prefix: int8 [S].
        live: int8 [S * 128].
        inverse: float32 [S].
        q_scale: float32 of codes: int8 [N, Hq], e4m3 [S].
        k_scale: float32 of codes: int8 [Hkv, S], e4m3 [S].
        keep: Blocks to keep per row, or 0 to go by ``mass``.
        mass: In steps of 2^-20.
        mean: Whether a group's scores become their mean rather than their maximum.
    """
    always = (prefix[:, None] | prefix) != 0
    candidate = (table != ABSENT) & ~always
    scores = _scores(q, k, live, inverse, q_scale, k_scale, mean).masked_fill(~candidate, -torch.inf)
    heads, rows, width = scores.shape
    ranked, best = scores.sort(dim=-1, descending=True, stable=True)
    held = ranked > -torch.inf
    if keep:
        chosen = held & (torch.arange(width, device=q.device) < keep)
    else:
        share = torch.where(held, ranked - ranked[..., :1], -torch.inf).exp()
        weight = (share * 2**WEIGHT_BITS).to(torch.int64).clamp(min=1) * held
        need = (weight.sum(dim=-1, keepdim=True) * mass + (2**MASS_BITS - 1)) >> MASS_BITS
        chosen = held & (weight.cumsum(dim=-1) - weight < need)
    kept = torch.zeros_like(chosen).scatter_(-1, best, chosen) | ((table != ABSENT) & always)
    kind = torch.where(kept, (table != FULL).to(torch.uint8), 2)
    columns = kind.argsort(dim=-1, stable=True)
    mask_ids = torch.where(kept, table, FULL).gather(-1, columns)
    total = kept.sum(dim=-1)
    return (
        torch.stack([(kind == 0).sum(dim=-1), total], dim=-1).to(torch.int32),
        torch.arange(0, heads * rows * width, width, dtype=torch.int32, device=q.device).view(heads, rows),
        columns.to(torch.int32).flatten(),
        mask_ids.flatten(),
        total.flatten().argsort(descending=True, stable=True).to(torch.int32),
    )


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    live: torch.Tensor,
    inverse: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    mean: bool,
) -> torch.Tensor:
    """[Hkv, R, S] float32: scaled products of the blocks' means.

    The products are of sums; what makes them means and takes e4m3 codes' scales in is one factor per pair of blocks, so
    that small integers give the same bits in any order of summation. int8 codes have scales within a block: their sums
    are of values.
    """
    heads, width = k.shape[1], q.shape[2]
    group = q.shape[1] // heads
    if q.dtype == torch.int8 and q_scale is not None and k_scale is not None:
        sums_q, sums_k = _sums(q, live, q_scale), _sums(k, live) * k_scale.T[:, :, None]
        q_scale = k_scale = None
    else:
        sums_q, sums_k = _sums(q, live), _sums(k, live)
    sums_q = sums_q.unflatten(1, (heads, group))  # [R, Hkv, G, D]
    sums_k = sums_k.permute(1, 2, 0)  # [Hkv, D, S]
    if mean:
        products = torch.matmul(sums_q.sum(dim=2).transpose(0, 1), sums_k)
    else:
        products = torch.matmul(sums_q.permute(1, 2, 0, 3).flatten(1, 2), sums_k).unflatten(1, (group, -1)).amax(dim=1)
    factor_q = (inverse if q_scale is None else inverse * q_scale) * (width**-0.5 / (group if mean else 1))
    factor_k = inverse if k_scale is None else inverse * k_scale
    return products * (factor_q[:, None] * factor_k)


def _sums(x: torch.Tensor, live: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """[blocks, heads, D] float32: sums over the tokens of every block, of codes times ``scale`` [tokens, heads]."""
    if scale is not None:
        x = x * scale[:, :, None]
    elif x.dtype == torch.float8_e4m3fn:
        x = x.to(torch.bfloat16)
    if x.shape[0] < len(live):
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, len(live) - x.shape[0]))
    return torch.where(live[:, None, None] != 0, x, 0).unflatten(0, (-1, BLOCK)).sum(dim=1, dtype=torch.float32)
