"""Weights spread over ranks: what a rank holds, and that its results are those of whole weights."""

import pytest
from rank_work import config_of, model_of, sharded

import happyhorse_fast as hh
from happyhorse_fast.fast.config import FastConfig

FORMS = [None, *(FastConfig(precision=name, backend="reference") for name in ("bf16", "int8", "fp8"))]


@pytest.mark.parametrize("fast", FORMS, ids=["eager", "bf16", "int8", "fp8"])
def test_a_rank_holds_half_of_every_matrix(two, fast):
    for found in two(sharded, 2, fast, None):
        assert found["same"]
        assert found["here"] == found["after"] == found["all"] / 2, "gathered weights were kept"
        assert found["restored"] is True if fast else "load the checkpoint again" in found["restored"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_model_is_sharded_while_it_is_loaded(two, tmp_path, precision):
    hh.save_checkpoint(model_of(config_of(2), None), tmp_path)
    for found in two(sharded, 2, FastConfig(precision=precision, backend="reference"), str(tmp_path)):
        assert found["same"]
        assert found["here"] == found["after"] == found["all"] / 2
        assert "the original weights were dropped" in found["restored"]


def test_loading_refuses_what_it_does_not_shard(tmp_path):
    with pytest.raises(ValueError, match="shard must come with fast and the published format"):
        hh.load(tmp_path, config=config_of(2), shard=object())
