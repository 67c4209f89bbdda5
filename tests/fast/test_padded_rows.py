"""The padded sequence: every token once, no tile of two modalities, exactly the asked pairs."""

from __future__ import annotations

import pytest
import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.eager.sequence import Clip, Ranges, dense_ranges, local_ranges
from happyhorse_fast.fast.padded_rows import PaddedRows

FULL = Clip(31, 34, 60, 121, 640)


def test_1080p_frames_are_aligned_and_540p_ones_are_not() -> None:
    rows = PaddedRows.of(FULL, windowed=True)
    assert rows.starts == (0, 31 * 2048, 31 * 2048 + 128, 64256)
    assert PaddedRows.of(FULL, windowed=False).starts == (0, 63360, 63488, 64128)
    smaller = PaddedRows.of(Clip(31, 16, 28, 121, 640), windowed=True)
    assert smaller.starts[1] == 31 * 448 + 64  # 13,888 tokens, up to a multiple of 128


clips = st.builds(Clip, *(st.integers(1, n) for n in (4, 5, 9, 140, 140)))


def _dense(ranges: Ranges, n: int) -> torch.Tensor:
    mask = torch.zeros(n, n, dtype=torch.bool)
    for q0, q1, k0, k1 in ranges:
        mask[q0:q1, k0:k1] = True
    return mask


@examples(25)
@given(clips, st.integers(0, 3), st.booleans(), st.booleans())
def test_ranges_keep_their_meaning(clip: Clip, receptive_field: int, local: bool, align: bool) -> None:
    spans = [(f * clip.frame_tokens, (f + 1) * clip.frame_tokens, 0) for f in range(clip.frames)]
    spans += [(clip.bounds[1], clip.bounds[2], 1), (clip.bounds[2], clip.bounds[3], 2)]
    rows = PaddedRows.of_spans(spans, align=align)
    where = rows.token_rows()
    assert len(torch.unique(where)) == clip.total
    tiles = rows.row_tiles(3)
    modality = torch.full((rows.slots,), -1)
    modality[where] = torch.repeat_interleave(torch.arange(3), torch.tensor([clip.video, clip.audio, clip.text]))
    for expert, first, end in tiles.tolist():
        assert set(modality[first:end].tolist()) <= {expert, -1}
    ranges = local_ranges(clip, receptive_field) if local else dense_ranges(clip)
    block_map = BlockMap.from_ranges(*rows.to_rows(ranges), rows.slots, rows.slots)
    block_map.validate()
    pairs = block_map.to_dense()[0]
    assert torch.equal(pairs[where][:, where], _dense(ranges, clip.total))
    padding = torch.ones(rows.slots, dtype=torch.bool)
    padding[where] = False
    assert not pairs[:, padding].any()


def test_one_clip_lies_as_its_spans_would() -> None:
    clip = Clip(3, 4, 32, 9, 130)
    spans = [(0, clip.video, 0), (clip.video, clip.video + 9, 1), (clip.video + 9, clip.total, 2)]
    assert PaddedRows.of(clip, windowed=False).starts == PaddedRows.of_spans(spans, align=False).starts
    assert torch.equal(
        PaddedRows.of(clip, windowed=False).token_rows(), PaddedRows.of_spans(spans, align=False).token_rows()
    )


def test_modalities_of_several_clips_are_gathered() -> None:
    spans = [(0, 100, 0), (100, 105, 1), (105, 107, 2), (107, 300, 0), (300, 310, 1), (310, 311, 2)]
    rows = PaddedRows.of_spans(spans, align=False)
    assert rows.starts == (0, 384, 512, 640)
    assert rows.token_rows()[[0, 99, 100, 105, 107, 299, 300, 310]].tolist() == [0, 99, 384, 512, 100, 292, 389, 514]


@pytest.mark.parametrize("first", [0, 128])
def test_tiles_of_a_part_count_from_its_start(first: int) -> None:
    rows = PaddedRows.of(Clip(1, 1, 128, 3, 4), windowed=False)
    assert rows.row_tiles(3, first, first + 256).tolist() == [
        [first // 128, 0, 128],
        [first // 128 + 1, 128, 256],
    ]
