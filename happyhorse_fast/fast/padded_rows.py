"""The padded sequence of the fast model: rows of tokens, laid out so that no tile holds two modalities.

Video, audio and text each start on a multiple of 128 rows. Where a layer has a frame window, every latent frame does
too, if that costs little: 2040 tokens in 2048 rows at 1080p make 99.6 % of a 128-block useful, unaligned it is 94 %.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from happyhorse_fast.block_map import BLOCK, Layout
from happyhorse_fast.eager.sequence import Clip, Ranges
from happyhorse_fast.ops.runtime.row_tiles import joined
from happyhorse_fast.parallel.rows import RowShare

# More padding than this costs the products more than aligned blocks save in attention: at 540p (448 tokens in 512 rows)
# it would be 14 %.
MOST_PADDING = 0.02

Spans = list[tuple[int, int, int]]
"""(first token, end token, modality) in the public order, together every token once."""


class Run(NamedTuple):
    """Consecutive tokens in consecutive rows.

    Attributes:
        first: First token.
        end: End token.
        row: Row of the first token.
        modality: 0 video, 1 audio, 2 text.
    """

    first: int
    end: int
    row: int
    modality: int


@dataclass(frozen=True)
class PaddedRows:
    """Rows of the padded sequence.

    Attributes:
        runs: Every token once, in the public order.
        starts: First rows of video, audio and text, and the number of rows; multiples of 128.
        layout: The clip's slots, where there is one clip in the usual order.
    """

    runs: tuple[Run, ...]
    starts: tuple[int, int, int, int]
    layout: Layout | None = None

    @classmethod
    def of(cls, clip: Clip, *, windowed: bool, most_padding: float = MOST_PADDING) -> PaddedRows:
        """Rows of one clip.

        Args:
            clip: Its tokens.
            windowed: Whether some layer has a frame window on it.
            most_padding: Of its tokens, what aligned frames may add in rows; else only modalities are aligned.
        """
        per, bounds = clip.frame_tokens, clip.bounds
        align = windowed and worth_aligning(per, most_padding)
        spans = [(f * per, (f + 1) * per, 0) for f in range(clip.frames)]
        spans += [(bounds[m], bounds[m + 1], m) for m in (1, 2)]
        layout = Layout(clip.frames, per, clip.audio, clip.text, align, align_modalities=True)
        return replace(cls.of_spans(spans, align=align), layout=layout)

    @classmethod
    def of_spans(cls, spans: Spans, *, align: bool) -> PaddedRows:
        """Rows of a sequence in any order, such as several clips one after another.

        Args:
            spans: Runs of one modality; video cut into its frames.
            align: Start every frame on a multiple of 128 rows, not only every modality.
        """
        place: dict[int, int] = {}
        starts, row = [], 0
        for modality in range(3):
            starts.append(row)
            for i, (first, end, m) in enumerate(spans):
                if m == modality:
                    place[i] = row
                    row += end - first
                    row = _up(row) if align and m == 0 else row
            row = _up(row)
        runs = tuple(Run(first, end, place[i], m) for i, (first, end, m) in enumerate(spans))
        return cls(runs, (starts[0], starts[1], starts[2], row))

    @property
    def slots(self) -> int:
        """Rows of the padded sequence."""
        return self.starts[3]

    def frame_spans(self) -> list[tuple[int, int]]:
        """Rows (first, end) of every run of video tokens."""
        return [(r.row, r.row + r.end - r.first) for r in self.runs if r.modality == 0]

    def prefix_spans(self) -> list[tuple[int, int]]:
        """Rows (first, end) of the audio and the text tokens."""
        return [(r.row, r.row + r.end - r.first) for r in self.runs if r.modality != 0]

    def token_rows(self, device: torch.device | None = None) -> torch.Tensor:
        """[N] int64: the row of every token, in the public order."""
        return torch.cat([torch.arange(r.row, r.row + r.end - r.first, device=device) for r in self.runs])

    def held(self, modality: int, share: RowShare) -> slice:
        """Of a modality's tokens in order, those in the rows of a share: their rows ascend, so they are a range."""
        runs = [run for run in self.runs if run.modality == modality]
        start, stop = (
            sum(min(max(row - run.row, 0), run.end - run.first) for run in runs) for row in (share.first, share.end)
        )
        return slice(start, stop)

    def row_tiles(
        self, experts: int, first: int = 0, end: int | None = None, device: torch.device | None = None
    ) -> torch.Tensor:
        """[tiles, 3] int32: (expert, first row, end row); see docs/OPS.md.

        Args:
            experts: 1 or 3.
            first: First row, a multiple of 128, that the table covers; rows in it count from there.
            end: End row, or None for all.
            device: Where to make it.
        """
        rows = torch.arange(first, self.slots if end is None else end, BLOCK, dtype=torch.int32, device=device)
        expert = torch.zeros_like(rows)
        if experts > 1:
            expert = (rows >= self.starts[1]).to(torch.int32) + (rows >= self.starts[2]).to(torch.int32)
        return torch.stack([expert, rows - first, rows - first + BLOCK], dim=1)

    @cached_property
    def _query_ends(self) -> dict[int, int]:
        # A padded query attends like its neighbours, so the last block of a run needs no mask; nobody reads the result.
        rows = sorted({*(r.row for r in self.runs), *self.starts})
        return {r.row: next(x for x in rows if x > r.row) for r in self.runs}

    def to_rows(self, ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention ranges over tokens as query and key ranges over rows, [ranges, 2] int64 each, half open.

        Keys never include padding.
        """
        table: list[tuple[int, int, int, int]] = []
        for q0, q1, k0, k1 in ranges:
            queries = []
            for run in self.runs:
                low, high = max(q0, run.first), min(q1, run.end)
                if low < high:
                    end = self._query_ends[run.row] if high == run.end else run.row + high - run.first
                    queries.append((run.row + low - run.first, end))
            keys = [
                (run.row + max(k0, run.first) - run.first, run.row + min(k1, run.end) - run.first)
                for run in self.runs
                if max(k0, run.first) < min(k1, run.end)
            ]
            table += [(*q, *k) for q in _joined(queries) for k in _joined(keys)]
        rows = torch.tensor(table, dtype=torch.int64).reshape(-1, 4)
        return rows[:, :2], rows[:, 2:]


def worth_aligning(frame_tokens: int, most_padding: float = MOST_PADDING) -> bool:
    """Whether starting every frame on a multiple of 128 rows costs at most so many more rows, by default 2 %."""
    return _up(frame_tokens) - frame_tokens <= most_padding * frame_tokens


def _up(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(first, end) for _, first, end in joined((0, *span) for span in sorted(spans))]
