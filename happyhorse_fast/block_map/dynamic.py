"""Blocks chosen by what q and k hold: on the device, in tensor operations, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import real_number, require_whole
from happyhorse_fast.block_map.assemble import compress
from happyhorse_fast.block_map.bits import BLOCK

FULL, ABSENT = -1, -2
"""Entries of a ``table`` that name no mask."""
WEIGHT_BITS = 30
"""A block's softmax weight is an integer, 2^30 for the best: sums are exact in any order, 11 bits more hold 2048."""
MASS_BITS = 20
"""``mass`` counts in steps of 2^-20: 41 + 20 bits of a sum times a mass stay within int64."""

Parts: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
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


@ambient.makes_tensors
def candidates(
    layout: Slots, full: torch.Tensor, ids: torch.Tensor, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of an exact map that a choice stays within, and the tokens that they hold; all on the map's device.

    Args:
        layout: Where the tokens lie.
        full: bool [1, R, S], as ``ids`` from :meth:`BlockMap.to_blocks`.
        ids: int32 [1, R, S].
        queries: The map's query tokens.
        keys: The map's key tokens.

    Returns:
        table, int32 [R, S]: the mask id of a partial block, FULL or ABSENT; prefix, int8 [S]: 1 for a block that holds
        audio or text; live, int8 [S * 128]: 1 for a slot that holds a token; inverse, float32 [S]: 1 / tokens of the
        block, 0 where it has none.

    Raises:
        ValueError: The map is of another size than the layout, or has several heads.
    """
    if (queries, keys) != (layout.slots, layout.slots):
        raise ValueError(f"base must have the layout's {layout.slots} slots, got {queries} x {keys}")
    if len(full) != 1:
        raise ValueError(f"base must be one map for all heads, got one for each of {len(full)}")
    device, blocks = full.device, full.shape[1]
    live = torch.zeros(blocks * BLOCK, dtype=torch.int8)
    for start, end in layout.frame_spans() + layout.prefix_spans():
        live[start:end] = 1
    tokens = live.view(blocks, BLOCK).sum(dim=1)
    return (
        torch.where(full[0], FULL, torch.where(ids[0] >= 0, ids[0], ABSENT)).to(torch.int32),
        touching(layout.prefix_spans(), blocks).to(device, torch.int8),
        live.to(device),
        torch.where(tokens > 0, 1 / tokens.clamp(min=1).float(), 0.0).to(device),
    )


def amount(
    q: torch.Tensor, k: torch.Tensor, slots: int, keep: int | None, mass: float | None, pool: str
) -> tuple[int, int]:
    """Check the arguments of a choice; (keep, mass in steps of 2^-20), one of the two being 0.

    Args:
        q: [N, Hq, D].
        k: [N, Hkv, D].
        slots: N.
        keep: Blocks per row, at least 1; or None.
        mass: Share of the softmax, 0 < mass <= 1; or None. One of the two is given.
        pool: ``"max"`` or ``"mean"``.

    Raises:
        ValueError: An argument is out of range or of the wrong shape.
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
        if x.dim() != 3 or x.shape[0] != slots:
            raise ValueError(f"{name} must be [{slots}, heads, D], got {list(x.shape)}")
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q must have a multiple of k's heads and its D, got {list(q.shape)} and {list(k.shape)}")
    if keep is not None:
        return min(keep, -(-slots // BLOCK)), 0
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
        table: See :func:`candidates`, as for ``prefix``, ``live`` and ``inverse``.
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
    counts, _, columns, order = compress(torch.where(kept, (table != FULL).to(torch.uint8), 2))
    return (
        counts,
        torch.arange(0, heads * rows * width, width, dtype=torch.int32, device=q.device).view(heads, rows),
        columns.to(torch.int32).flatten(),
        torch.where(kept, table, FULL).gather(-1, columns).flatten(),
        order,
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
