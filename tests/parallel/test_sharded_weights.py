"""Weights spread over ranks: what a rank holds, and that its results are those of whole weights."""

from types import SimpleNamespace

import pytest
import torch
from rank_work import config_of, gathered_bytes, model_of, sharded, shares_of, whole_layers

import happyhorse_fast as hh
from happyhorse_fast.fast.config import FastConfig

FORMS = [None, *(FastConfig(precision=name, backend="reference") for name in ("bf16", "int8", "fp8"))]


@pytest.mark.quick(2)
@pytest.mark.parametrize("fast", FORMS, ids=["eager", "bf16", "int8", "fp8"])
def test_a_rank_holds_half_of_every_matrix(two, fast):
    for found in two(sharded, 2, fast, None):
        assert found["same"]
        assert found["here"] == found["after"] == found["all"] / 2, "gathered weights were kept"
        assert found["restored"] is True if fast else "load the checkpoint again" in found["restored"]


@pytest.mark.quick(2)
@pytest.mark.parametrize("form", ["eager", "bf16", "fp8", "packed"])
def test_a_model_is_sharded_while_it_is_loaded(two, tmp_path, form):
    fast = None if form == "eager" else FastConfig(precision="bf16" if form == "bf16" else "fp8", backend="reference")
    if form == "packed":
        hh.save_packed(model_of(config_of(2), fast), tmp_path)
    else:
        hh.save_checkpoint(model_of(config_of(2), None), tmp_path)
    for found in two(sharded, 2, fast, str(tmp_path)):
        assert found["same"]
        assert found["here"] == found["after"] == found["all"] / 2
        assert ("the original weights were dropped" if fast else "load the checkpoint again") in found["restored"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("form", ["packed", "bf16", "eager"])
def test_no_rank_ever_holds_the_whole_model(two, tmp_path, form):
    config, fast = config_of(2, num_layers=4, mm_layers=(), gelu7_layers=()), FORMS[1]
    if form == "packed":
        hh.save_packed(model_of(config, fast), tmp_path)
    else:
        hh.save_checkpoint(model_of(config, None), tmp_path)
    given = {"packed": (None, None), "bf16": (config, fast), "eager": (config, None)}[form]
    assert two(whole_layers, 2, str(tmp_path), *given) == [[1, 1, 1, 1]] * 2


def test_shares_of_different_checkpoints_are_found(two, tmp_path):
    for rank in range(2):
        model = model_of(config_of(2), None)
        with torch.no_grad():
            model.block.layers[1].mlp.down_proj.weight[3, 5] += rank
        hh.save_checkpoint(model, tmp_path / str(rank))
    for error in two(shares_of, 2, str(tmp_path)):
        assert isinstance(error, ValueError) and "weights must be the same on all 2 ranks, got " in str(error)


@pytest.mark.quick(1)
@pytest.mark.parametrize("fast", FORMS, ids=["eager", "bf16", "int8", "fp8"])
def test_a_rank_holds_what_is_planned(two, fast):
    for (held, whole), planned in two(gathered_bytes, 2, fast):
        assert held == planned[0]
        assert whole == pytest.approx(planned[1], rel=0.05)


def test_a_mesh_of_another_kind_of_device_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shard must be a mesh of cpu devices, as device is; got cuda"):
        hh.load(tmp_path, config=config_of(2), shard=SimpleNamespace(device_type="cuda"))
