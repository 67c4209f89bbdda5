"""What a rank holds: its own rows between attentions, all rows of its own heads within."""

import pytest
from over_ranks import SIX_TILES
from rank_work import config_of, held_sizes

from happyhorse_fast.fast.config import FastConfig

ROWS, TOKENS, HIDDEN, HEADS_Q, HEADS_KV, D = 6 * 128, 4 * 128 + 13 + 6, 96, 8, 4, 32
MLP = (384, 256, 512)
"""GELU7; SwiGLU7 after and before its activation."""


# Names are told by their widths, so these are all different: of the stream, the MLP, and a head's 32, 64 or 128.
@pytest.mark.parametrize("how", [None, FastConfig(backend="reference")], ids=["eager", "fast"])
def test_a_rank_holds_its_rows_or_its_heads(two, how):
    rows = TOKENS if how is None else ROWS
    share, parts = -(-rows // 2), HEADS_KV // 2 if how else 1
    for streams, attended, made in two(held_sizes, 2, config_of(HEADS_KV, hidden_size=HIDDEN), how, SIX_TILES):
        assert streams == [(share, HIDDEN)] * 2
        q, k = HEADS_Q // 2 // parts, HEADS_KV // 2 // parts
        assert attended == [[(rows, q, D), (rows, k, D), (rows, k, D)]] * (2 * parts)
        by_width = [(shape[0], shape[-1]) for shape in made if len(shape) == 2 and shape[-1] in (HIDDEN, *MLP)]
        assert (share, HIDDEN) in by_width
        assert not [shape for shape in by_width if shape[0] in (rows, 2 * share)], "rows of another rank"
