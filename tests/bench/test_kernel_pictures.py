"""The pictures and pages of docs/kernels: one per kernel, committed as the scripts make them, true to their models."""

import itertools

import pytest

from bench.report import dataflow, kernel_tables
from bench.report.attention_turns import PRODUCT, schedule
from bench.report.kernel_pictures import FINISH, PICTURES, main, ring
from bench.report.lanes import FOLDER
from bench.results import ROOT
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.launches import launches_per_layer


@pytest.mark.parametrize("name", PICTURES)
def test_a_committed_picture_is_what_the_script_draws(name):
    assert (FOLDER / f"{name}.svg").read_text() == PICTURES[name]().svg(), "run python -m bench.report.kernel_pictures"


def test_every_launch_table_has_a_page_with_a_picture():
    stems = {path.stem for path in (ROOT / "kernels" / "configs").glob("*.json")}
    assert stems == {path.stem for path in FOLDER.glob("*.md")} == set(kernel_tables.OPS)
    for stem in stems:
        text = (FOLDER / f"{stem}.md").read_text()
        assert f"`kernels/{stem}" in text and f"]({stem}" in text and ".svg)" in text


def test_the_script_writes_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.kernel_pictures.FOLDER", tmp_path)
    monkeypatch.setattr(dataflow, "FIGURE", tmp_path / "layer.svg")
    main()
    assert {path.stem for path in tmp_path.iterdir()} == {*PICTURES, "layer"}


@pytest.mark.parametrize("precision", dataflow.FORMS)
def test_the_figure_of_a_layer_has_the_launches_that_a_layer_makes_in_order(precision):
    seen = dataflow.launches(precision)
    (counted, *_) = launches_per_layer(FastConfig(precision=precision, attention=dataflow.FORMS[precision]))
    ours = [name.partition("::")[2].removesuffix("_reference") for name in counted if "happyhorse_fast::" in name]
    assert [launch.op for launch in seen] == [name for name in ours if name in dataflow.RESULTS]
    assert [launch.step for launch in seen] == [step for step in dataflow.ORDER if step in {x.step for x in seen}]
    for launch in seen[:-1]:
        assert all(made.readers for made in launch.writes), f"nobody reads what {launch.step} writes"
    assert dataflow.FIGURE.read_text() == dataflow.svg(), "run python -m bench.report.kernel_pictures"


def test_a_size_of_the_model_that_is_drawn_says_which_dimension_it_is():
    assert len(dataflow.LETTERS) == 9, "two dimensions have one size"


@pytest.mark.parametrize("name", PICTURES)
def test_no_lane_does_two_things_at_once_and_arrows_come_from_what_ends(name):
    picture = PICTURES[name]()
    ends = {(bar.lane, round(bar.end, 6)) for bar in picture.bars}
    for lane in picture.lanes:
        mine = sorted((bar.start, bar.end) for bar in picture.bars if bar.lane == lane)
        assert all(b[0] - a[1] > -1e-9 for a, b in itertools.pairwise(mine)), lane
    for arrow in picture.arrows:
        assert {arrow.source, arrow.target} <= picture.lanes.keys()
        if name != "attention_turns":  # there a turn is passed, and a slot released, within a bar
            assert (arrow.source, round(arrow.time, 6)) in ends


def test_turns_keep_the_tensor_cores_busy():
    bars, _, period = schedule()
    mine = sorted((bar.start, bar.end) for bar in bars if bar.lane == "tensor cores")
    assert max(b[0] - a[1] for a, b in itertools.pairwise(mine)) == 0
    assert period == 4 * PRODUCT


@pytest.mark.parametrize("flattened", [True, False])
def test_a_product_waits_for_its_slot_and_the_next_tiles_loads_for_the_epilogue_where_the_loop_is_not_flattened(
    flattened,
):
    bars, _, _ = ring(4, ("one", "two"), flattened=flattened)
    loads, products = ([b for b in bars if test(b)] for test in (lambda b: b.faint, lambda b: b.lane == "tensor cores"))
    assert len(loads) == len(products)
    for load, product in zip(loads, products, strict=True):
        assert product.start >= load.end
    epilogue = [bar for bar in bars if bar.lane == FINISH]
    second = loads[len(loads) // 2]
    assert (second.start < epilogue[0].start) is flattened
    assert (second.start >= epilogue[1].end) is not flattened
