"""The eager model over processes against one, on gloo.

Its products are of as many rows as a rank holds, and a library orders its sums by that number: so ranks and one process
differ by rounding. The fast model's ranks hold whole tiles of 128 rows, and give the bits of one process.
"""

import pytest
import torch
from over_ranks import SIX_TILES, UNEVEN, WINDOW, check
from rank_work import config_of

ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Relative L2; in bf16 what the public code's own rounding makes of it is 4e-3 to 6e-3."""


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("sizes", [SIX_TILES, UNEVEN])
def test_two_ranks_give_what_one_gives(two, dtype, sizes):
    config = config_of(2, post_norm_layers=(0,), **WINDOW)
    check(two, config, None, sizes, within=ROUNDING[dtype], compute_dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("sizes", [SIX_TILES, UNEVEN, (1, 1, 2, 2)])
def test_more_ranks_give_what_one_gives(many, dtype, sizes):
    check(many, config_of(8, **WINDOW), None, sizes, within=ROUNDING[dtype], compute_dtype=dtype)
