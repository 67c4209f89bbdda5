"""The accelerated model over 2, 4 and 8 processes against one, on backend reference and gloo."""

import numpy as np
import pytest
from over_ranks import SIX_TILES, UNEVEN, WINDOW, check
from rank_work import config_of

from happyhorse_fast.fast.config import FastConfig, Tiles, TopK, TopP

FORMATS = (
    ("bf16", "bf16"),
    ("int8", "int8_qk"),
    ("fp8", "fp8"),
    ("fp8", "int8_qk"),
    ("fp8", "int8_qk_fp8_v"),
    ("bf16", "fp8"),
)
MASKS = [
    ("window", WINDOW, None),
    ("top_k", {}, TopK(0.5)),
    ("top_k_in_window", WINDOW, TopK(0.5)),
    ("top_p", {}, TopP(0.6)),
    ("tiles", {}, Tiles(1, 2, 30)),
]


def fast(precision="bf16", attention="bf16", **options):
    return FastConfig(precision=precision, attention=attention, backend="reference", **options)


@pytest.mark.parametrize(("precision", "attention"), FORMATS)
@pytest.mark.parametrize("sizes", [SIX_TILES, UNEVEN])
def test_two_ranks_give_the_bits_of_one(two, precision, attention, sizes):
    check(two, config_of(4), fast(precision, attention), sizes)


@pytest.mark.parametrize(("name", "changes", "sparsity"), MASKS, ids=lambda x: x if isinstance(x, str) else "")
def test_two_ranks_have_the_mask_of_one(two, name, changes, sparsity):
    dense = check(two, config_of(4), fast())
    masked = check(two, config_of(4, **changes), fast(sparsity=sparsity))
    assert not np.array_equal(dense[0], masked[0]), "the mask left nothing out"


@pytest.mark.parametrize("how", [fast(), fast("fp8", "fp8", mlp_rows=128)])
@pytest.mark.parametrize("public", [False, True])
def test_two_ranks_in_another_signature_with_post_norms_and_mlp_in_parts(two, how, public):
    check(two, config_of(2, post_norm_layers=(0,)), how, UNEVEN, public=public)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "attention"), [FORMATS[0], FORMATS[2], FORMATS[3]])
def test_the_kernels_give_the_bits_of_one(two, precision, attention):
    """Triton's, interpreted: they take heads of wider rows; three tiles, so that one of four is a dummy."""
    how = FastConfig(precision=precision, attention=attention, backend="triton", sparsity=TopK(0.5))
    check(two, config_of(4), how, (1, 64, 13))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "attention"), FORMATS)
@pytest.mark.parametrize("sizes", [SIX_TILES, UNEVEN])
def test_more_ranks_give_the_bits_of_one(many, precision, attention, sizes):
    check(many, config_of(8), fast(precision, attention), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize(("name", "changes", "sparsity"), MASKS, ids=lambda x: x if isinstance(x, str) else "")
def test_more_ranks_have_the_mask_of_one(many, precision, name, changes, sparsity):
    attention = {"int8": "int8_qk"}.get(precision, precision)
    check(many, config_of(8, **changes), fast(precision, attention, sparsity=sparsity))
