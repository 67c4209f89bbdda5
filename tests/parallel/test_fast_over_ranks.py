"""The accelerated model over 2, 4 and 8 processes against one, on backend reference and gloo."""

import numpy as np
import pytest
from rank_pool import rank_pool
from rank_work import alone_and_together, config_of

from happyhorse_fast.fast.config import FastConfig

FORMATS = (("bf16", "bf16"), ("int8", "int8_qk"), ("fp8", "fp8"), ("fp8", "int8_qk"))
SIX_TILES, UNEVEN = (4, 64, 13), (3, 50, 140, 7)


@pytest.fixture(scope="module")
def two():
    with rank_pool(2) as pool:
        yield pool


def fast(precision="bf16", attention="bf16", **options):
    return FastConfig(precision=precision, attention=attention, backend="reference", **options)


def check(pool, config, how, sizes=SIX_TILES, **options):
    results = pool(alone_and_together, pool.ranks, config, how, sizes, **options)
    for result in results:
        if isinstance(result, Exception):
            raise result
    alone = results[0][0]
    for rank, (_, together, again) in enumerate(results):
        for wanted, there, repeated in zip(alone, together, again, strict=True):
            assert np.array_equal(there, repeated), f"rank {rank} differs from itself"
            assert np.array_equal(there, wanted), f"rank {rank}: {np.abs(there - wanted).max()} from one process"
    return alone


@pytest.mark.parametrize(("precision", "attention"), FORMATS)
@pytest.mark.parametrize("sizes", [SIX_TILES, UNEVEN])
def test_two_ranks_give_the_bits_of_one(two, precision, attention, sizes):
    check(two, config_of(4), fast(precision, attention), sizes)
