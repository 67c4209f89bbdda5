"""The figure of docs/kernels/block_sparse_attention.md: committed as the script draws it, and true to its own model."""

import itertools

from bench.attention_turns import FIGURE, PRODUCT, schedule, svg


def test_the_committed_figure_is_what_the_script_draws():
    assert FIGURE.read_text() == svg(), "run python -m bench.attention_turns"


def test_no_lane_does_two_things_at_once_and_turns_keep_the_tensor_cores_busy():
    bars, _, period = schedule()
    for lane in {bar.lane for bar in bars}:
        mine = sorted((bar.start, bar.end) for bar in bars if bar.lane == lane)
        gaps = [b[0] - a[1] for a, b in itertools.pairwise(mine)]
        assert min(gaps) >= 0, lane
        if lane == "tensor cores":
            assert max(gaps) == 0
    assert period == 4 * PRODUCT
