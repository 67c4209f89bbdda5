"""The Hopper kernel itself: when it is taken, what its emulation catches, and what the compiler makes of it.

Its results, in every case of the other kernels: test_block_sparse_attention.py, "specialized".
"""

import pytest
import torch
from attention_cases import FORMATS, MAP, inputs, problems, specialized
from gluon_emulator import Emulated, EmulationError

from bench.specialized import running
from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.kernels import launch
from happyhorse_fast.ops.block_sparse_attention import block_sparse_attention
from happyhorse_fast.ops.triton import block_sparse_attention as launcher
from happyhorse_fast.ops.triton.device import pretend

UNEVEN = BlockMap.from_ranges([(0, 100), (100, 250), (290, 400)], [(30, 400), (0, 333), (0, 1)], 400, 400)
"""Rows that begin with a partial block, rows without a key, and a last block of queries that is not whole."""


def attention(given, block_map=MAP, seed=1, replace=(), **options):
    """The op through the emulated kernel."""
    with specialized(seed, replace):
        return block_sparse_attention(**given, block_map=block_map, scale=32**-0.5, **options)


def launched(fmt, monkeypatch, given=None, **options):
    """Whether a call launches the Hopper kernel."""
    calls = []
    monkeypatch.setattr(Emulated, "__getitem__", lambda self, grid: lambda *a, **k: calls.append(grid))
    attention(inputs(fmt) if given is None else given, **options)
    return bool(calls)


@pytest.mark.parametrize("fmt", FORMATS)
def test_taken_where_tiles_can_be_described(fmt, monkeypatch):
    assert launched(fmt, monkeypatch)
    assert launched(fmt, monkeypatch, return_lse=True)
    assert launched(fmt, monkeypatch, k_mean=torch.zeros(2, 32))
    assert launched(fmt, monkeypatch, k_mean=torch.zeros(2, 32), return_lse=True)
    for name in "qk":
        given = inputs(fmt)
        given[name] = given[name].transpose(0, 2).contiguous().transpose(0, 2)
        assert not launched(fmt, monkeypatch, given), f"{name} with channels apart"


def test_taken_on_hopper_for_heads_of_128_and_nowhere_else():
    q, narrow = (torch.empty(256, 2, d, dtype=torch.bfloat16, device="meta") for d in (128, 64))
    codes = q.to(torch.float8_e4m3fn)
    transposed = torch.empty(2, 128, 256, dtype=torch.float8_e4m3fn, device="meta")
    for given in ((q, q, q), (codes, codes, q), (codes, codes, transposed)):
        with pretend(90):
            assert launcher.launch_config(*given).specialized
            assert launcher.launch_config(*given, lse=True).specialized
        with pretend(90, tracing=True):  # a trace holds no descriptors: plain Triton, through pointers
            assert not launcher.launch_config(*given).specialized
            assert not launcher.launch_config(*given).descriptors
        with pretend(100):
            assert not launcher.launch_config(*given).specialized
    with pretend(90):
        assert not launcher.launch_config(narrow, narrow, narrow).specialized, "measured at 128 alone"
        with running("triton"):
            assert not launcher.launch_config(q, q, q).specialized, "the plain kernel, by its name"
    assert launch.config_for(launcher.STEM, "bf16_d128_specialized", 90).specialized
    config = launch.config_for(launcher.STEM, "bf16_d128_specialized", 90)
    assert launch.illegal(config, 90, fp8=False, shared_bytes=0) is None
    for arch in (80, 100, 120):
        assert launch.illegal(config, arch, fp8=False, shared_bytes=0)


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_depend_neither_on_the_order_of_copies_nor_of_groups(fmt):
    given = inputs(fmt)
    first = attention(given, seed=2, return_lse=True)
    for seed in (3, 4, 5):
        again = attention(given, seed=seed, return_lse=True)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True))


PLANTED = {
    "v not awaited": ("    await_full(v_ring, use, sizes.stages)\n", ""),
    "k not awaited": ("    stage = await_full(k_ring, use, sizes.stages)\n", "    stage = use % sizes.stages\n"),
    "queries not awaited": ("slot = await_full(q_ring, turn, Q_SLOTS)", "slot = turn % Q_SLOTS"),
    "k never released": ("    release(k_ring, stage)\n    if MASKED", "    if MASKED"),
    "queries never released": ("        release(q_ring, slot)\n", ""),
    "one reader": ("k_ring = make_ring(k, 1, STAGES, GROUPS)", "k_ring = make_ring(k, 1, STAGES, 1)"),
    "three readers": ("k_ring = make_ring(k, 1, STAGES, GROUPS)", "k_ring = make_ring(k, 1, STAGES, 3)"),
    "wrong parity, full": ("use // SLOTS & 1)\n", "(use // SLOTS & 1) ^ 1)\n"),
    "wrong parity, empty": ("(use // SLOTS & 1) ^ 1)", "use // SLOTS & 1)"),
    "bytes of one tile": ("TILES * source.block_type.nbytes", "source.block_type.nbytes"),
    "no fence": ("    fence_async_shared()\n", ""),
    "step forgotten": ("            use += n_all\n", "            use += n_all - 1\n"),
    "other slot": ("q_ring.tiles.index(slot * GROUPS + WHICH)", "q_ring.tiles.index(slot * GROUPS)"),
    "other mask word": ("column // 32 == word", "column // 64 == word"),
    "other half's mask": ("(first + row) * WORDS", "row * WORDS"),
    "no guard of empty rows": ('new_max == -float("inf"), 0.0', 'new_max == 1.0, 0.0'),
    "rows past the end": ("mask=(query < queries)[:, None])", "mask=None)"),
    "sum not rescaled": ("row_sum * alpha + gl.sum", "row_sum + gl.sum"),
    "other key/value head": ("channel = head // sizes.group * sizes.d", "channel = head % sizes.group * sizes.d"),
}  # fmt: skip
BF16 = PLANTED | {
    "result before its wait": ("warpgroup_mma_wait(1, deps=[s_pending])", "warpgroup_mma_wait(2, deps=[s_pending])"),
    "v released early": (
        "        s = warpgroup_mma_wait(1, deps=[s_pending])\n",
        "        release(v_ring, before)\n        s = warpgroup_mma_wait(1, deps=[s_pending])\n",
    ),
    "accumulator not rescaled": (
        "acc = warpgroup_mma_wait(0, deps=[pv_pending]) * gl.convert_layout(alpha, sizes.o_row)[:, None]",
        "acc = warpgroup_mma_wait(0, deps=[pv_pending])",
    ),
}
E4M3 = PLANTED | {
    "v never released": ("        release(v_ring, before)\n        s = warp", "        s = warp"),
    "scale of the next v": ("scale_at(work, scales.v, at - 1, 1.0)", "scale_at(work, scales.v, at, 1.0)"),
    "tokens in their own order": ("in_fragment_order(p.to(gl.float8e4nv))", "p.to(gl.float8e4nv)"),
    "scale of k forgotten": ("scale_at(work, scales.k, at, scales.softmax)", "scales.softmax"),
}


def planted(fmt, seed, replace):
    """What is found of an output with bugs planted."""
    given = inputs(fmt, 400, heads=(6, 2), spread=3.0)
    try:
        out = attention(given, UNEVEN, seed, replace)[0]
    except EmulationError as error:
        return [str(error)]
    return problems(given, UNEVEN, out, 32**-0.5, backend="specialized")


@pytest.mark.parametrize(("fmt", "bug"), [(f, bug) for f, bugs in (("bf16", BF16), ("fp8", E4M3)) for bug in bugs])
def test_planted_bugs_are_caught(fmt, bug):
    assert any(planted(fmt, seed, [(BF16 | E4M3)[bug]]) for seed in (1, 2))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("seed", range(4))
def test_without_them_nothing_is_found(fmt, seed):
    assert planted(fmt, seed, []) == []
