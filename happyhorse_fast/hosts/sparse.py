"""Pairs of tokens that a host's self-attention leaves out, on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from happyhorse_fast.arguments import require_whole
from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector
from happyhorse_fast.fast.config import TopK, TopP
from happyhorse_fast.ops import select_blocks


@dataclass(frozen=True)
class Chosen:
    """Blocks of 128 keys chosen by q and k, for calls of one length; approximate.

    Attributes:
        policy: What to keep of the blocks that hold video alone, per key head and block of queries.
        tokens: Queries, and keys, of the calls that it is for. Other calls are exact.
        video: (start, end) of the tokens to choose from; the others are kept in every row, and see everything. All
            where None.

    Raises:
        TypeError: ``policy`` is no :class:`TopK` or :class:`TopP`.
        ValueError: ``tokens`` is below 1, or ``video`` leaves them.
    """

    policy: TopK | TopP
    tokens: int
    video: tuple[int, int] | None = None
    _selectors: dict[torch.device, BlockSelector] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, TopK | TopP):
            raise TypeError(f"policy must be TopK or TopP, got {type(self.policy).__name__}")
        require_whole("tokens", self.tokens, 1)
        start, end = self.span
        if not 0 <= start < end <= self.tokens:
            raise ValueError(f"video must be a span of the {self.tokens} tokens, got {self.video}")

    @property
    def span(self) -> tuple[int, int]:
        """(start, end) of the video."""
        return (0, self.tokens) if self.video is None else self.video

    @property
    def slots(self) -> int:
        """Tokens, as a selector asks for them."""
        return self.tokens

    def frame_spans(self) -> list[tuple[int, int]]:
        """Spans to choose from."""
        return [self.span]

    def prefix_spans(self) -> list[tuple[int, int]]:
        """Spans that every row keeps."""
        start, end = self.span
        return [(0, start), (end, self.tokens)]

    def map(self, q: Tensor, k: Tensor, backend: str) -> BlockMap:
        """The map for q [N, Hq, D] and k [N, Hkv, D]; ``backend`` as for `ops.select_blocks`."""
        if q.device not in self._selectors:
            base = BlockMap.dense(self.tokens, self.tokens, q.device)
            self._selectors[q.device] = BlockSelector(self, base, q.device)
        selector = self._selectors[q.device]
        if isinstance(self.policy, TopP):
            return select_blocks(q, k, selector, mass=self.policy.mass, backend=backend)
        return select_blocks(q, k, selector, keep=max(1, round(self.policy.keep * self._blocks())), backend=backend)

    def _blocks(self) -> int:
        """Blocks that hold video alone."""
        start, end = self.span
        first, last = -(-start // BLOCK), end // BLOCK if end < self.tokens else -(-end // BLOCK)
        return max(1, last - first)


class Sparse:
    """What to leave out of which calls.

    Args:
        sparsity: A :class:`BlockMap` for one head, for calls of its number of queries and keys; or :class:`Chosen`.

    Raises:
        TypeError: It is neither.
        ValueError: The map is of several heads, whose calls would have to have as many key heads.
    """

    def __init__(self, sparsity: BlockMap | Chosen) -> None:
        if not isinstance(sparsity, BlockMap | Chosen):
            raise TypeError(
                "sparsity must be a BlockMap, such as BlockMap.tile_window makes, or hosts.Chosen(TopK(0.25), tokens); "
                f"got {type(sparsity).__name__}"
            )
        if isinstance(sparsity, BlockMap) and sparsity.heads != 1:
            raise ValueError(f"sparsity must be a map for one head, got one for each of {sparsity.heads}")
        self.sparsity = sparsity
        self._maps: dict[torch.device, BlockMap] = {}

    def maps(self, q: Tensor, k: Tensor, backend: str) -> Sequence[BlockMap | None]:
        """A map for all items of the batch, or one for each.

        Args:
            q: [B, Hq, N, D].
            k: [B, Hkv, M, D].
            backend: Of the choice.

        Returns:
            The maps; of a call that it is not for None, which is exact.
        """
        here = self.sparsity
        size = (here.queries, here.keys) if isinstance(here, BlockMap) else (here.tokens, here.tokens)
        if size != (q.shape[2], k.shape[2]):
            return [None]
        if isinstance(here, Chosen):
            return [here.map(x.transpose(0, 1), y.transpose(0, 1), backend) for x, y in zip(q, k, strict=True)]
        if q.device not in self._maps:
            self._maps[q.device] = here.to(q.device)
        return [self._maps[q.device]]
