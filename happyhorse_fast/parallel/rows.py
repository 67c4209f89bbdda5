"""Which rows of a sequence a rank holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowShare:
    """Consecutive rows of a sequence, as many on every rank; the last ranks' may lie past its end and be dummies.

    Attributes:
        total: Rows of the sequence.
        unit: Rows that stay together, such as a tile's 128; divides ``total``.
        ranks: Number of ranks P.
        rank: This one.
    """

    total: int
    unit: int = 1
    ranks: int = 1
    rank: int = 0

    @property
    def count(self) -> int:
        """Rows that every rank holds, dummies included: whole units, at least one."""
        return max(1, -(-self.total // (self.unit * self.ranks))) * self.unit

    @property
    def first(self) -> int:
        """First row of this rank."""
        return self.rank * self.count

    @property
    def end(self) -> int:
        """End row of this rank, dummies included."""
        return self.first + self.count

    def held(self) -> tuple[int, ...]:
        """Rows of the sequence on each rank, without dummies."""
        return tuple(min(max(self.total - rank * self.count, 0), self.count) for rank in range(self.ranks))

    def of(self, rank: int) -> RowShare:
        """The share of another rank."""
        return RowShare(self.total, self.unit, self.ranks, rank)

    def within(self, start: int, end: int) -> slice:
        """Of rows ``start`` to ``end`` those that this rank holds, counted from ``start``."""
        low, high = (min(max(row, start), end) - start for row in (self.first, self.end))
        return slice(low, high)
