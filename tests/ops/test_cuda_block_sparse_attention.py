"""The CUDA attention kernel in the shim: orders, planted bugs, banks, bounds, and the Triton kernel beside it.

What holds for every backend is in test_block_sparse_attention.py, which runs this one too.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_mutants import mutant
from cuda_shim import SHIM, ShimError
from strict import poisoned_outputs, strict

from happyhorse_fast import budgets
from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.kernels.launch import LaunchConfig
from happyhorse_fast.ops import block_sparse_attention
from happyhorse_fast.ops.attention import triton
from happyhorse_fast.ops.attention.cuda import STEM
from happyhorse_fast.ops.attention.reference import sparse_attention
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.ops.runtime.cuda.launch import use_runner

FORMS = {"running": math.inf, "bounded": LIMIT}
"""Of the softmax, and the bound that asks for each."""
BOTH = pytest.mark.parametrize("form", FORMS)
QUERIES, KEYS, HEADS = 260, 290, (4, 2)
# Full, partial and ragged blocks, 3 and 2 in a row; queries from 190 on see nothing, 4 of them in a block of their own.
MAP = BlockMap.from_ranges([(0, 130), (130, 190)], [(0, 290), (120, 280)], QUERIES, KEYS)


def followed_by_nan(x):
    """The same values in a larger tensor, with NaN where a kernel that reads past the end would look."""
    whole = torch.full((len(x) + 128, *x.shape[1:]), torch.nan, dtype=x.dtype)
    whole[: len(x)] = x
    return whole[: len(x)]


def inputs(d=32, queries=QUERIES, keys=KEYS, heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (queries, heads[0], d), "k": (keys, heads[1], d), "v": (keys, heads[1], d)}
    given = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    options = {"gate": torch.rand(queries, heads[0], generator=generator), "scale": d**-0.5}
    return {name: followed_by_nan(x) for name, x in given.items()} | options


def attention(given, block_map=MAP, form="running", backend="cuda", fp8_out=False):
    options = {"bound": FORMS[form], "return_lse": True, "fp8_out": fp8_out, "backend": backend}
    with poisoned_outputs():
        return block_sparse_attention(**given, block_map=block_map, **options)


def bits(tensors):
    return [t.view(torch.uint8) for t in tensors]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(bits(first), bits(second), strict=True))


def problems(given, result, block_map=MAP, form="running"):
    """Faults of (out, LSE), against float64 with P rounded where the form of the kernel rounds it."""
    out, lse = result
    exact, exact_lse = sparse_attention(
        **given,
        block_map=block_map,
        bounded=form == "bounded",
        wide=torch.float64,
        round_out=False,
        return_lse=True,
    )
    found = budgets.violations(budgets.measure(out, exact))
    # Where P is rounded elsewhere, a tenth of the elements are another bf16, with the errors that both may have.
    if float((out != exact.bfloat16()).float().mean()) > 0.02:
        found.append("P is rounded elsewhere")
    if not torch.allclose(lse, exact_lse, atol=1e-5, rtol=1e-6):
        found.append("LSE")
    return found


@BOTH
@pytest.mark.parametrize("fp8_out", [False, True], ids=["bf16", "fp8"])
def test_no_order_of_threads_and_blocks_changes_a_bit(fp8_out, form):
    given = inputs()
    results = []
    for seed in (0, 1, 2):
        with SHIM.order(seed):
            results.append(attention(given, form=form, fp8_out=fp8_out))
    assert all(same(results[0], other) for other in results[1:])
    out, out_scale, lse = results[0]
    value = out.float() * out_scale if fp8_out else out
    if not fp8_out:
        assert problems(given, (value, lse), form=form) == []
    empty = slice(190, None)
    assert (value[empty] == 0).all() and (lse[:, empty] == -torch.inf).all() and torch.isfinite(lse[:, :190]).all()


@BOTH
@pytest.mark.parametrize("d", [32, 64, 128])
def test_it_agrees_with_the_triton_kernel(d, form, monkeypatch):
    # In steps of 128 keys as well: with another running maximum P is rounded otherwise, 2e-6 apart.
    config = LaunchConfig(block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=False)
    monkeypatch.setattr(triton, "launch_config", lambda *_, **__: config)
    given = inputs(d, 150, 290, heads=(2, 1))
    block_map = BlockMap.from_ranges([(0, 130), (130, 149)], [(0, 290), (120, 280)], 150, 290)
    ours = attention(given, block_map, form)
    with strict(seed=1):
        theirs = attention(given, block_map, form, backend="triton")
    # Only values on a boundary of bf16 fall to another side.
    assert budgets.measure(ours[0], theirs[0]).tile_distance < 1e-8
    assert float((ours[0] != theirs[0]).float().mean()) < 0.01
    torch.testing.assert_close(ours[2], theirs[2], atol=1e-5, rtol=1e-6)


def one_key():
    """Every query sees one key, each another score: (inputs, map, its v)."""
    given = inputs(heads=(2, 2)) | {"gate": None}
    keys = [7 * i % KEYS for i in range(QUERIES)]
    rows = [(i, i + 1) for i in range(QUERIES)]
    return given, BlockMap.from_ranges(rows, [(j, j + 1) for j in keys], QUERIES, KEYS), given["v"][keys]


@BOTH
def test_one_key_alone_gives_its_v_exactly(form):
    given, block_map, expected = one_key()
    assert torch.equal(attention(given, block_map, form)[0], expected)


def by_flag(given, value, shim=SHIM):
    """(out, LSE) of the op with a flag."""
    options = [given["scale"], False, torch.tensor([value], dtype=torch.int32), given["gate"], None, True]
    op = torch.ops.happyhorse_fast.block_sparse_attention_cuda
    with use_runner(shim), poisoned_outputs():
        out, lse = op(*(given[x] for x in "qkv"), *MAP.tensors(), *options)
    return out, lse


def wide():
    """Scores that only a running maximum takes: the bounded form overflows."""
    given = inputs()
    return given | {"q": given["q"] * 60}


def flag_is_heeded(shim):
    """Whether of the two launches the flag leaves one."""
    given = wide()
    return all(
        same(by_flag(given, value, shim), attention(given, form=form)[::2])
        for value, form in ((1, "bounded"), (0, "running"))
    )


def test_of_two_launches_the_flag_lets_one_compute():
    given = wide()
    assert flag_is_heeded(SHIM)
    assert not torch.isfinite(by_flag(given, 1)[0]).all() and torch.isfinite(by_flag(given, 0)[0]).all()


def test_what_fits_is_found_on_the_device():
    for given, form in ((inputs(), "bounded"), (wide(), "running")):
        with poisoned_outputs():
            out, _, lse = block_sparse_attention(**given, block_map=MAP, return_lse=True, backend="cuda")
        assert same((out, lse), attention(given, form=form)[::2])


@BOTH
def test_nan_stays_nan(form):
    given = inputs()
    given["q"][3] = torch.nan
    out, _, lse = attention(given, form=form)
    assert out[3].isnan().all() and lse[:, 3].isnan().all()
    assert torch.isfinite(out[4:]).all()


def test_heads_of_a_map_of_their_own():
    # In one launch, every row and head has blocks that no other has: an index of the schedule that is off shows.
    generator = torch.Generator().manual_seed(4)
    wanted = torch.rand(2, 3, 3, generator=generator) < 0.5
    wanted[:, :, 0] = True
    maps = [
        BlockMap.from_ranges(
            [(128 * r, min(128 * r + 128, QUERIES)) for r, s in rows.nonzero().tolist()],
            [(128 * s, min(128 * s + 128, KEYS)) for r, s in rows.nonzero().tolist()],
            QUERIES,
            KEYS,
        )
        for rows in wanted
    ]
    joined = stacked(maps)
    joined.validate()
    given = inputs(seed=5)
    out, _, lse = attention(given, joined)
    assert problems(given, (out, lse), joined) == []
    alone = attention(given, maps[0])[0]
    assert torch.equal(out[:, :2], alone[:, :2]) and not torch.equal(out[:, 2:], alone[:, 2:])


def stacked(maps):
    """One map with a head per map."""
    columns = [len(m.columns) for m in maps]
    masks = [len(m.mask_bits) for m in maps]
    rows = maps[0].rows
    return BlockMap(
        counts=torch.cat([m.counts for m in maps]),
        starts=torch.cat([m.starts + sum(columns[:h]) for h, m in enumerate(maps)]),
        columns=torch.cat([m.columns for m in maps]),
        mask_ids=torch.cat([torch.where(m.mask_ids < 0, -1, m.mask_ids + sum(masks[:h])) for h, m in enumerate(maps)]),
        mask_bits=torch.cat([m.mask_bits for m in maps]),
        order=torch.cat([m.order + h * rows for h, m in enumerate(maps)]).flip(0),
        queries=QUERIES,
        keys=KEYS,
    )


# Shared memory ------------------------------------------------------------------------------------------------------


# Shared memory serves rows of 16 bytes at once where they lie in different banks of 8, those of one bank in turns.
COUNTED = """
#include <algorithm>
#include <set>

unsigned long long conflicts = 0;
extern "C" unsigned long long bank_conflicts() { return conflicts; }

void count(const void* row) {
  const unsigned char* const table = shim::exchange(SHIM_SITE("count"), 0xffffffffu, &row, sizeof row);
  if (shim::lane() % 8 != 0) return;
  std::set<std::uintptr_t> rows;  // one read serves all lanes of a row
  for (int i = 0; i < 8; ++i) rows.insert(shim::read<std::uintptr_t>(table, shim::lane() + i));
  int in_bank[8] = {};
  for (const std::uintptr_t at : rows) ++in_bank[at / 16 % 8];
  conflicts += static_cast<unsigned>(*std::max_element(in_bank, in_bank + 8) - 1);
}

#undef ldmatrix_x4
#undef ldmatrix_x4_trans
#define ldmatrix_x4(r, row) (count(row), shim::load_matrices(SHIM_SITE("ldmatrix_x4"), r, row, false))
#define ldmatrix_x4_trans(r, row) (count(row), shim::load_matrices(SHIM_SITE("ldmatrix_x4_trans"), r, row, true))
"""


def test_matrices_are_read_without_bank_conflicts(tmp_path):
    head = "constexpr int WARPS = 8;"
    counted = (head, COUNTED + head)
    swizzled = mutant(tmp_path, STEM, *counted)
    with use_runner(swizzled):
        for d in (32, 64, 128):
            attention(inputs(d, 10, 130, heads=(1, 1)), BlockMap.dense(10, 130))
            assert swizzled.library.bank_conflicts() == 0, d
    swizzle = "(chunk ^ row / (8 / PLACES) % PLACES) * 16"
    plain = mutant(tmp_path, STEM, *counted, swizzle, "(chunk ^ 0 * PLACES) * 16")
    given, block_map = inputs(64, 10, 130, heads=(1, 1)), BlockMap.dense(10, 130)
    with use_runner(plain):
        assert same(attention(given, block_map), attention(given, block_map))
    assert plain.library.bank_conflicts() > 0, "8 rows of 128 bytes in one bank"


@pytest.mark.parametrize("d", [32, 64, 128])
def test_a_block_fits_every_architecture(d):
    from happyhorse_fast.ops.attention.cuda import SHARED_BYTES_PER_CHANNEL
    from happyhorse_fast.ops.runtime.cuda.launch import MOST_SHARED_BYTES

    assert SHARED_BYTES_PER_CHANNEL * d <= MOST_SHARED_BYTES


# Planted bugs -------------------------------------------------------------------------------------------------------

WAIT, MEET = "    wait_for_copies();\n", "    __syncthreads();"
FIRST, SECOND = "  // k is there, and every warp has read the last v\n", "  // v is there, and every warp has read k\n"
BUGS = {
    "k is not met for": (WAIT + MEET + FIRST, WAIT),
    "v is not met for": (WAIT + MEET + SECOND, WAIT),
    "k is not waited for": (WAIT + MEET + FIRST, MEET),
    "v is not waited for": (WAIT + MEET + SECOND, MEET),
    "q of an empty row is not waited for": ("  if (n_all == 0) {", "  if (false) {"),
    "a row's lanes are not all asked for its maximum": (
        "for (int step = 1; step < 4; step *= 2) x = fmaxf",
        "for (int step = 1; step < 2; step *= 2) x = fmaxf",
    ),
    "a sum over another row's lanes": (
        "for (int step = 1; step < 4; step *= 2) x += ",
        "for (int step = 2; step < 8; step *= 2) x += ",
    ),
    "a key past the end is read": ("i * ROWS_AT_ONCE < end ?", "i * ROWS_AT_ONCE <= end ?"),
    "the last query is not stored": ("if (row >= rows) continue;", "if (row + 1 >= rows) continue;"),
    "the mask of the row above": ("mask[lane_of_thread() / 4 + 8 * half]", "mask[lane_of_thread() / 4]"),
    "every row of the map has full blocks alone": ("if (i >= n_full) hide", "if (i > n_full) hide"),
    "the mask of the block before": ("p.mask_ids[start + i]", "p.mask_ids[start + i - (i > n_full)]"),
    "fragments of p change places": (
        "p[2 * depth][1], p[2 * depth + 1][0]",
        "p[2 * depth + 1][0], p[2 * depth][1]",
    ),
    "the output keeps an old maximum": ("      acc[j][2 * half + 1] *= factor;\n    }\n  }\n}", "    }\n  }\n}"),
    "no key makes NaN": ("maximum == minus_infinity() ? 0.0f : maximum", "maximum"),
    "key/value heads in turn": (
        "const int kv_head = head / (p.heads_q / p.heads_kv);",
        "const int kv_head = head % p.heads_kv;",
    ),
    "the first block twice": ("    column = next;\n", ""),
}
RUNNING_ALONE = (
    "a row's lanes are not all asked for its maximum",
    "the output keeps an old maximum",
    "no key makes NaN",
)
"""Bugs of code that the bounded form has not."""


PAIR = "low_bf16(p[j][half]) + high_bf16(p[j][half])"
LSE_WANTED = "soften_bounded(weights, s, rows, p.scale, p.lse != nullptr)"
BOUNDED_BUGS = {
    "P is summed before it is rounded": (f"after += {PAIR}", "after += left + right"),
    "the LSE is of P after rounding": ("before += left + right", f"before += {PAIR}"),
    "the LSE has no sum": (LSE_WANTED, "soften_bounded(weights, s, rows, p.scale, false)"),
    "the maximum is kept": ("    if (BOUNDED) {\n", "    if (false) {\n"),
    "halves of a pair change places": (
        "= pack_bf16(left, right);\n      if (lse)",
        "= pack_bf16(right, left);\n      if (lse)",
    ),
}
FLAG_BUGS = {
    "the flag is ignored": ("  if (p.flag != nullptr && (*p.flag != 0) != BOUNDED) return;", " "),
    "the flag is upside down": ("(*p.flag != 0) != BOUNDED", "(*p.flag != 0) == BOUNDED"),
}


E4M3_BUGS = {
    "the scale for its reciprocal": ("factor *= 1.0f / *p.out_scale", "factor *= *p.out_scale"),
    "no scale": ("if (p.out_scale != nullptr) factor", "if (false) factor"),
    "neighbours change places": ("static_cast<u16>(low | high << 8)", "static_cast<u16>(high | low << 8)"),
}


def e4m3_is_right(shim):
    """Whether e4m3 output is within one rounding of what bf16 output has: 2^-4, or half the smallest code."""
    given = inputs()
    with use_runner(shim):
        plain = attention(given)[0].float()
        codes, scale, _ = attention(given, fp8_out=True)
    return bool(((codes.float() * scale - plain).abs() <= plain.abs() * (2**-4 + 2**-8) + 2**-10 * scale).all())


@pytest.mark.quick(1)
@pytest.mark.parametrize("bug", E4M3_BUGS)
def test_a_planted_bug_of_e4m3_output_is_caught(bug, tmp_path):
    assert e4m3_is_right(SHIM) and not e4m3_is_right(mutant(tmp_path, STEM, *E4M3_BUGS[bug]))


@pytest.mark.quick(1)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    bad = mutant(tmp_path, STEM, *BUGS[bug])
    for form in ("running",) if bug in RUNNING_ALONE else FORMS:
        assert caught(bad, form), (bug, form)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BOUNDED_BUGS)
def test_a_planted_bug_of_the_bounded_form_is_caught(bug, tmp_path):
    bad = mutant(tmp_path, STEM, *BOUNDED_BUGS[bug])
    assert caught(bad, "bounded") and not caught(bad, "running")


@pytest.mark.slow
@pytest.mark.parametrize("bug", FLAG_BUGS)
def test_a_planted_bug_of_the_flag_is_caught(bug, tmp_path):
    assert not flag_is_heeded(mutant(tmp_path, STEM, *FLAG_BUGS[bug]))


@BOTH
def test_the_kernel_without_a_planted_bug_passes(form):
    assert not caught(SHIM, form)


def caught(shim, form):
    given = inputs()
    alone, block_map, expected = one_key()
    first = None
    for order in (0, 1, 2):
        try:
            with use_runner(shim), shim.order(order):
                if not torch.equal(attention(alone, block_map, form)[0], expected):
                    return True
                out, _, lse = attention(given, form=form)
        except ShimError:
            return True
        first = first or (out, lse)
        if problems(given, (out, lse), form=form) or not same(first, (out, lse)):
            return True
    return False


# The op -------------------------------------------------------------------------------------------------------------


def test_opcheck():
    given = inputs(32, 130, 130, heads=(2, 1))
    tensors = [given[name] for name in "qkv"] + list(BlockMap.dense(130, 130).tensors())
    torch.library.opcheck(
        torch.ops.happyhorse_fast.block_sparse_attention_cuda.default,
        (*tensors, 0.2, False, torch.ones(1, dtype=torch.int32), given["gate"], None, True),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"],
    )


def unaligned(x, by):
    """The same shape, ``by`` elements into a buffer."""
    return torch.zeros(x.numel() + by, dtype=x.dtype)[by:].view(x.shape)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), r"q must have contiguous channels .* strides"),
        ("v", lambda x: torch.zeros(*x.shape[:2], 64, dtype=x.dtype)[..., ::2], "v must have contiguous channels"),
        ("k", lambda x: unaligned(x, 4), "k must start on a multiple of 16 bytes"),
        (
            "k",
            lambda x: torch.zeros(len(x), 2, 36, dtype=x.dtype)[..., :32],
            "k must have rows .* a multiple of 8 apart",
        ),
        ("v", lambda x: torch.zeros(len(x), 68, dtype=x.dtype)[:, :64].unflatten(1, (2, 32)), "v must have rows"),
    ],
)
def test_rows_that_16_byte_loads_cannot_take_are_named(name, change, message):
    given = inputs()
    with pytest.raises(ValueError, match=message):
        attention(given | {name: change(given[name])})


@pytest.mark.parametrize("fmt", ["int8_qk", "fp8"])
def test_8_bits_are_refused_by_name(fmt):
    if fmt == "int8_qk":
        q, k, v = (torch.zeros(n, h, 32, dtype=torch.int8) for n, h in ((QUERIES, 4), (KEYS, 2), (KEYS, 2)))
        v, scales = v.bfloat16(), {"q_scale": torch.ones(QUERIES, 4), "k_scale": torch.ones(2, 3)}
    else:
        q, k, v = (torch.zeros(s).to(torch.float8_e4m3fn) for s in ((QUERIES, 4, 32), (KEYS, 2, 32), (2, 32, 384)))
        scales = {"q_scale": torch.ones(3), "k_scale": torch.ones(3), "v_scale": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"q, k and v must be bfloat16 for backend 'cuda', got .*(int8|float8_e4m3fn)"):
        block_sparse_attention(q, k, v, MAP, scale=0.1, backend="cuda", **scales)
