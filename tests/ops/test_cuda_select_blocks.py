"""The CUDA kernels of the choice of blocks: equal bits in every order of threads, rows of any width, planted bugs."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from cuda_mutants import mutant
from cuda_shim import SHIM, ShimError
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from select_cases import ALIGNED, RAGGED, SCORES, cases, differences, held, inputs, integers, selector
from strict import poisoned_outputs

from happyhorse_fast.block_map import Layout, dynamic
from happyhorse_fast.block_map.dynamic import ABSENT, FULL
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.block_selection import contract
from happyhorse_fast.ops.block_selection import cuda as launcher
from happyhorse_fast.ops.block_selection.contract import empty_results
from happyhorse_fast.ops.runtime import self_check
from happyhorse_fast.ops.runtime.cuda.launch import launch, use_runner

ORDERS = (0, 1, 2)
ROOM = 2**18
"""Elements before and after a result, for the places that a planted bug may write to: two halves of a word of ones."""


def roomy(shape):
    """An int32 tensor with room around it."""
    whole = torch.full((ROOM + int(np.prod(shape)) + ROOM,), -7, dtype=torch.int32)
    return whole[ROOM:-ROOM].view(shape)


# The whole op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", SCORES)
@pytest.mark.parametrize("amount", [{"keep": 2}, {"mass": 0.6, "pool": "mean"}])
def test_every_order_of_threads_gives_the_same_bits(fmt, amount):
    chooser, given = selector(RAGGED), inputs(RAGGED, heads=(4, 2), d=64, fmt=fmt, spread=2.0)
    maps = []
    for seed in ORDERS:
        with SHIM.order(seed), poisoned_outputs():
            maps.append(select_blocks(**given, selector=chooser, **amount, backend="cuda"))
    wanted = select_blocks(**given, selector=chooser, **amount, backend="reference")
    assert [differences(block_map, wanted) for block_map in maps] == [[], [], []]


def test_many_blocks_take_several_tiles_of_scores_and_warps_of_columns():
    layout = Layout(30, 1150, 30, 60)
    chooser = selector(layout)
    blocks = len(chooser.prefix)
    assert blocks > 2 * launcher.SCORE_ROWS and launcher.select_threads(blocks) == 64
    held(chooser, integers(layout, heads=(2, 1), distinct=150), backend="cuda", keep=60)


@examples(15)
@given(cases())
def test_any_layout(case):
    layout, radius, heads, seed, amount = case
    chooser = selector(layout, radius)
    held(chooser, integers(layout, heads, seed=seed, distinct=5), backend="cuda", **amount)
    held(chooser, inputs(layout, heads, seed=seed, spread=3.0), backend="cuda", **amount)


@pytest.mark.parametrize("fmt", SCORES)
@pytest.mark.parametrize("form", ["packed", "channels-first", "odd-start", "odd-rows", "one-head-for-all"])
def test_any_strides(form, fmt):
    given = inputs(heads=(2, 2), fmt=fmt)
    if form == "one-head-for-all":
        given["q"] = given["q"][:, :1].expand(-1, 2, -1)
    strided = dict(given)
    for name in "qk":
        x = given[name].view(torch.int16 if fmt == "bf16" else torch.uint8)  # which pad and cat take
        heads, d = x.shape[1:]
        if form == "packed":
            x = torch.cat([x, x, x], dim=1)[:, heads : 2 * heads]
        elif form == "channels-first":
            x = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        elif form == "odd-start":
            x = torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape)
        elif form == "odd-rows":
            x = torch.nn.functional.pad(x.flatten(1), (0, 3))[:, : heads * d].unflatten(1, (heads, d))
        strided[name] = x.view(given[name].dtype)
    assert launcher.strided(strided["q"]).vectors == (form in ("packed", "one-head-for-all"))
    wanted = held(selector(), {n: x.contiguous() for n, x in given.items()}, backend="cuda", keep=2)
    assert differences(held(selector(), strided, backend="cuda", keep=2), wanted) == []


@pytest.mark.parametrize("fmt", SCORES)
def test_the_self_check_passes(fmt):
    assert self_check._judge(self_check.CHECKS["select_blocks"]("cuda", torch.device("cpu"), fmt))[0]


# The choice alone, for rows of any width ------------------------------------------------------------------------------


def chosen(scores, table, prefix, keep, mass, rows):
    """The kernel's (counts, starts, columns, mask_ids) for the first rows of every head, from scores [Hkv, S, S]."""
    heads, blocks = scores.shape[:2]
    stride = -(-blocks // 4) * 4
    # What is past a row would win, were it read.
    padded = torch.nn.functional.pad(scores, (0, stride - blocks), value=torch.inf).contiguous()
    counts, starts, columns, mask_ids = (
        roomy(shape) for shape in ((heads, blocks, 2), (heads, blocks), (heads, blocks**2), (heads, blocks**2))
    )
    params = launcher.SelectBlocksParams(
        scores=padded.data_ptr(),
        table=table.data_ptr(),
        prefix=prefix.data_ptr(),
        counts=counts.data_ptr(),
        starts=starts.data_ptr(),
        columns=columns.data_ptr(),
        mask_ids=mask_ids.data_ptr(),
        blocks=blocks,
        score_stride=stride,
        keep=keep,
        mass=mass,
    )
    threads = launcher.select_threads(blocks)
    launch("select_blocks", "select_blocks", params, (rows, heads, 1), threads, launcher.SELECT_BYTES, scores)
    return first_rows(counts, starts, columns, mask_ids, rows)


def first_rows(counts, starts, columns, mask_ids, rows):
    heads, blocks = starts.shape
    per_row = (x.view(heads, blocks, blocks)[:, :rows] for x in (columns, mask_ids))
    return counts[:, :rows], starts[:, :rows], *per_row


def wanted_choice(scores, table, prefix, keep, mass, rows):
    """The same by plain torch."""
    with mock.patch.object(dynamic, "_scores", return_value=scores):
        parts = dynamic.choose(scores, scores, table, prefix, prefix, scores, None, None, keep, mass, False)
    return first_rows(*parts[:4], rows)


def row_case(blocks, distinct, seed, heads=1):
    """(scores, table, prefix): scores of few values, so that there are ties, zeros of both signs among them."""
    random = np.random.default_rng(seed)
    values = np.concatenate([[0.0, -0.0], random.normal(scale=3.0, size=distinct)]).astype(np.float32)
    scores = torch.from_numpy(values[random.integers(0, len(values), (heads, blocks, blocks))])
    table = random.choice([FULL, ABSENT, 0, 3], (blocks, blocks), p=[0.6, 0.2, 0.1, 0.1]).astype(np.int32)
    prefix = (random.random(blocks) < 0.1).astype(np.int8)
    return scores, torch.from_numpy(table), torch.from_numpy(prefix)


def unequal(ours, wanted):
    return [
        name
        for name, a, b in zip(("counts", "starts", "columns", "mask_ids"), ours, wanted, strict=True)
        if (a != b).any()
    ]


@examples(40)
@given(
    blocks=st.sampled_from([1, 2, 31, 33, 255, 256, 257, 300, 513]),
    distinct=st.sampled_from([1, 5, 1000]),
    seed=st.integers(0, 999),
    order=st.sampled_from(ORDERS),
    amount=st.tuples(st.integers(1, 520), st.just(0)) | st.tuples(st.just(0), st.integers(1, 2**20)),
)
def test_rows_of_any_width(blocks, distinct, seed, order, amount):
    case = row_case(blocks, distinct, seed, heads=2)
    with SHIM.order(order):
        ours = chosen(*case, *amount, rows=min(blocks, 3))
    assert unequal(ours, wanted_choice(*case, *amount, rows=min(blocks, 3))) == []


@pytest.mark.slow
@pytest.mark.parametrize("amount", [(300, 0), (0, 2**19), (0, 2**20)])
@pytest.mark.parametrize("distinct", [2, 4000])
def test_the_widest_row(amount, distinct):
    case = row_case(2048, distinct, seed=1)
    case[2][:2] = 0  # rows of which not all is kept
    assert unequal(chosen(*case, *amount, rows=2), wanted_choice(*case, *amount, rows=2)) == []


def test_weights_add_up_past_32_bits():
    # 2047 equal weights of 2^30, and one below any share of them that must still be kept for a mass of 1.
    scores, table = torch.zeros(1, 2048, 2048), torch.full((2048, 2048), FULL, dtype=torch.int32)
    scores[:, :, 5] = -100.0
    for mass, count in ((1, 1), (2**19, 1024), (2**20, 2048)):
        counts, *_ = chosen(scores, table, torch.zeros(2048, dtype=torch.int8), 0, mass, rows=1)
        assert counts[0, 0].tolist() == [count, count]


def ordered(counts):
    order = roomy(counts.shape[:1])
    params = launcher.OrderRowsParams(counts=counts.data_ptr(), order=order.data_ptr(), rows=len(counts))
    grid = (-(-len(counts) // 32), 1, 1)
    launch("select_blocks", "order_rows", params, grid, launcher.ORDER_THREADS, launcher.ORDER_BYTES, counts)
    return order


def lengths(rows):
    return torch.randint(0, 9, (rows, 2), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 150, 600])
def test_rows_are_ordered_longest_first_and_equal_ones_as_they_come(rows):
    counts = lengths(rows)
    wanted = counts[:, 1].argsort(descending=True, stable=True).to(torch.int32)
    for seed in ORDERS:
        with SHIM.order(seed):
            assert torch.equal(ordered(counts), wanted)


# Planted bugs ---------------------------------------------------------------------------------------------------------


def roomy_results(k, table):
    return tuple(roomy(x.shape) for x in empty_results(k, table))


@pytest.fixture(scope="module")
def judged():
    """Cases that show planted bugs: [(how to run, what must come)], made by plain torch."""
    chooser, tied = selector(radius=1), integers(ALIGNED, heads=(4, 2), d=64, distinct=6)
    for x in tied.values():
        x[250:256] = torch.nan  # padding
    last = {name: x * (torch.arange(64) % 32 == 31) for name, x in tied.items()}
    rows, counts = row_case(301, 5, seed=3), lengths(600)
    rows[2][:2] = 0
    found = []
    for inputs_of in (tied, last):
        for amount in ({"keep": 2}, {"mass": 0.6}, {"mass": 0.6, "pool": "mean"}):
            run = partial(select_blocks, **inputs_of, selector=chooser, **amount)
            found.append((lambda run=run: run(backend="cuda").tensors(), run(backend="reference").tensors()))
    run = partial(select_blocks, **inputs(RAGGED, heads=(4, 2), fmt="int8_qk", spread=2.0), selector=selector(RAGGED))
    found.append((lambda run=run: run(keep=2, backend="cuda").tensors(), run(keep=2, backend="reference").tensors()))
    for amount in ((40, 0), (0, 2**19)):
        found.append((partial(chosen, *rows, *amount, rows=2), wanted_choice(*rows, *amount, rows=2)))
    order = counts[:, 1].argsort(descending=True, stable=True).to(torch.int32)
    return [*found, (lambda: (ordered(counts),), (order,))]


def problems(shim, judged):
    """Fault of a runner's kernels, in the first order of threads where something is."""
    for seed in ORDERS:
        roomy_too = mock.patch.object(contract, "empty_results", roomy_results)
        with use_runner(shim), shim.order(seed), roomy_too:
            try:
                for index, (run, wanted) in enumerate(judged):
                    if not all(torch.equal(a, b) for a, b in zip(run(), wanted, strict=True)):
                        return f"another result of case {index} in order {seed}"
            except ShimError as error:
                return str(error)
    return None


def test_no_problems_without_a_planted_bug(judged):
    assert problems(SHIM, judged) is None


MUTANTS = {
    "pooled sums read before they are there": (
        "+ channel + i] = sums[i];\n  __syncthreads();",
        "+ channel + i] = sums[i];",
    ),
    "tile read before it is there": ("first_column, p, 1);\n      __syncthreads();", "first_column, p, 1);"),
    "tile overwritten while it is read": ("__syncthreads();  // the tile before this one has been read", ""),
    "warps added up too early": ("= x;\n  __syncthreads();\n  return join(", "= x;\n  return join("),
    "warps counted too early": ("scratch[warp] = x;\n  __syncthreads();", "scratch[warp] = x;"),
    "scratch overwritten while it is read": ("sums[bit % 2]", "sums[0]"),
    "lengths read before they are there": (": -1;\n    __syncwarp();", ": -1;"),
    "lengths overwritten while they are read": ("__syncwarp();  // the lengths before these have been read", ""),
    "a lane too many before this one": ("(1u << lane_of_thread()) - 1u", "(2u << lane_of_thread()) - 1u"),
    "a warp too many before this one": ("lane < warp ? given", "lane <= warp ? given"),
    "ties to the highest block": (
        "tied_in_warp + count_below(ballot);",
        "tied_in_warp + static_cast<u32>(__popc(ballot)) - 1 - count_below(ballot);",
    ),
    "ties of other warps forgotten": ("(tied_before + tied_below[i])", "(0 * tied_before + tied_below[i])"),
    "padding counted": ("row < BLOCK && p.live[slot + row] != 0", "row < BLOCK"),
    "the last column left out": (
        "const bool inside = column < p.blocks;",
        "const bool inside = column < p.blocks - 1;",
    ),
    "a channel left out": ("i < SCORE_DEPTH; ++i", "i < SCORE_DEPTH - 1; ++i"),
    "a query head of the group left out": ("int member = 1; member < members", "int member = 2; member < members"),
    "the last blocks left out": ("if (block < p.blocks) sums[i]", "if (block < p.blocks - 3) sums[i]"),
    "int8 codes without a sign": ("to_float(Code{static_cast", "to_float(e4m3{static_cast"),
    "the scale of another row": ("row_scale[(slot + row) * p.heads_q]", "row_scale[row * p.heads_q]"),
    "the scale of another head": ("p.q_scale + head : nullptr", "p.q_scale : nullptr"),
    "the scale of another block of keys": ("p.k_scale[head * gridDim.y + blockIdx.y]", "p.k_scale[blockIdx.y]"),
    "equal rows in reverse": ("(first + i + 3 < row)", "(first + i + 3 > row)"),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("bug", MUTANTS)
def test_planted_bugs_are_caught(bug, judged, tmp_path):
    assert problems(mutant(tmp_path, "select_blocks", *MUTANTS[bug]), judged)
