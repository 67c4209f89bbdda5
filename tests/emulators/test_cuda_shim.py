"""The shim of csrc/ itself: what it reports, what it makes visible, and that its instructions and numbers are right."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_shim import Shim, ShimError

SOURCE = Path(__file__).with_name("shim_kernels.cu")
SHIM = Shim([SOURCE])
ORDERS = (0, 1, 2)
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


class ShimParams(ctypes.Structure):
    """`ShimParams` of shim_kernels.cu."""

    _fields_ = [("in", ctypes.c_void_p), ("out", ctypes.c_void_p), ("size", ctypes.c_int), ("variant", ctypes.c_int)]


def run(kernel, given=None, out=None, *, variant=0, size=0, blocks=1, threads=32, shared=0):
    """Launch a kernel of shim_kernels.cu; gives ``out``, which it writes."""
    addresses = (None if x is None else x.ctypes.data for x in (given, out))
    SHIM("shim_kernels", kernel, ShimParams(*addresses, size, variant), (blocks, 1, 1), threads, shared)
    return out


def in_orders(kernel, given, out, **launch):
    """What a kernel writes in every order of threads and blocks."""
    results = []
    for seed in ORDERS:
        with SHIM.order(seed):
            results.append(run(kernel, given, out.copy(), **launch))
    return results


def line(mark):
    """Number of the line of shim_kernels.cu that is marked so."""
    lines = [i for i, text in enumerate(SOURCE.read_text().splitlines(), 1) if text.endswith(f"// line: {mark}")]
    assert len(lines) == 1
    return lines[0]


# Meetings -------------------------------------------------------------------------------------------------------------


def test_a_barrier_that_a_thread_does_not_reach():
    run("one_has_returned", threads=64)
    at = line("barrier that thread 37 does not reach")
    wanted = (
        r"block \(0, 0, 0\): deadlock: not all threads meet: "
        rf"63 \(first: thread 0\) waits in __syncthreads at shim_kernels.cu:{at}; 1 \(first: thread 37\) has returned;"
    )
    with pytest.raises(ShimError, match=wanted):
        run("one_has_returned", threads=64, variant=1)


def test_a_deadlock_names_threads_and_lines():
    run("never_meet", threads=64)
    wanted = (
        rf"33 \(first: thread 0\) waits in __syncthreads at shim_kernels.cu:{line('barrier of warp 0 and one lane')}; "
        rf"31 \(first: thread 33\) waits in __syncwarp at shim_kernels.cu:{line('meeting without that lane')};"
    )
    for seed in ORDERS:
        with SHIM.order(seed), pytest.raises(ShimError, match=wanted):
            run("never_meet", threads=64, variant=1)


def test_a_deadlock_names_the_block():
    with pytest.raises(ShimError, match=r"block \(2, 0, 0\): deadlock"), SHIM.order(1):
        run("one_has_returned", threads=64, variant=1, blocks=3)


@pytest.mark.parametrize(
    ("kernel", "marks"),
    [
        ("two_barriers", ("__syncthreads|barrier of warp 0", "__syncthreads|barrier of warp 1")),
        ("lanes_part", ("__ballot_sync|ballot of half the lanes", "__shfl_sync|shuffle of half the lanes")),
    ],
)
def test_threads_that_part(kernel, marks):
    run(kernel, threads=64)
    places = [f"{what} at shim_kernels.cu:{line(mark)}" for what, mark in (m.split("|") for m in marks)]
    for seed, (late, early) in ((0, places[::-1]), (1, places)):
        with SHIM.order(seed), pytest.raises(ShimError, match=rf"thread \d+: {late}, while thread \d+ .*in {early}"):
            run(kernel, threads=64, variant=1)


def test_a_mask_of_some_lanes():
    run("half_a_mask")
    wanted = f"__shfl_sync at shim_kernels.cu:{line('shuffle with a mask')}: the mask must name all 32 lanes"
    with pytest.raises(ShimError, match=wanted):
        run("half_a_mask", variant=1)


def test_the_shim_works_after_a_launch_that_failed():
    given = np.arange(64, dtype=np.int32)
    with pytest.raises(ShimError, match="deadlock"):
        run("never_meet", threads=64, variant=1)
    assert (run("reverse", given, np.zeros_like(given), size=64, threads=64, shared=256) == given[::-1]).all()


# Shared memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["reverse", "reverse_in_warps"])
def test_a_missing_barrier_between_write_and_read(kernel):
    given = np.arange(128, dtype=np.int32)
    launch = {"size": 128, "threads": 128, "shared": 512}
    wanted = given[::-1] if kernel == "reverse" else given.reshape(4, 32)[:, ::-1].reshape(-1)
    assert all((x == wanted).all() for x in in_orders(kernel, given, np.zeros_like(given), **launch))
    wrong = in_orders(kernel, given, np.zeros_like(given), variant=1, **launch)
    assert all((x != wanted).any() for x in wrong)
    assert (wrong[0] != wrong[1]).any()
    assert set(np.setdiff1d(np.concatenate(wrong), given)) == {-1}  # what no thread has written is poison


def test_a_missing_barrier_between_read_and_the_next_write():
    launch = {"size": 128, "threads": 128, "shared": 512}
    read = 127 - (np.arange(128) ^ 3)
    wanted = sum(7 ** (2 - i) * (1000 * i + read) for i in range(3))
    assert all((x == wanted).all() for x in in_orders("rounds", None, np.zeros(128, np.int32), **launch))
    wrong = in_orders("rounds", None, np.zeros(128, np.int32), variant=1, **launch)
    assert any((x != wanted).any() for x in wrong) and (wrong[0] != wrong[1]).any()


def test_every_block_finds_poison():
    words = run("as_it_comes", None, np.zeros(3 * 32, np.uint32), blocks=3, shared=128)
    assert (words == 0xFFFFFFFF).all()
    assert np.isnan(words.view(np.float32)).all()
    assert torch.from_numpy(words.view(np.int16)).view(BF16).isnan().all()
    assert torch.from_numpy(words.view(np.uint8)).view(E4M3).float().isnan().all()


def test_orders():
    ascending, descending, shuffled, again = (
        x[1:]
        for x in (
            *in_orders("who_comes_when", None, np.zeros(193, np.int32), blocks=3, threads=64),
            *in_orders("who_comes_when", None, np.zeros(193, np.int32), blocks=3, threads=64)[2:],
        )
    )
    assert (ascending == np.arange(192)).all() and (descending == np.arange(192)[::-1]).all()
    assert (np.sort(shuffled) == np.arange(192)).all() and (shuffled != ascending).any()
    assert (shuffled == again).all()
    with SHIM.order(3):
        other = run("who_comes_when", None, np.zeros(193, np.int32), blocks=3, threads=64)[1:]
    assert (other != shuffled).any()


@pytest.mark.parametrize("size", [0, 5, 16])
def test_a_copy_is_there_once_it_is_waited_for(size):
    given = np.arange(1, 17, dtype=np.uint8)
    before, after = run("copied", given, np.zeros((2, 16), np.uint8), size=size, shared=16)
    assert (before == 0xFF).all()
    assert (after == np.where(np.arange(16) < size, given, 0)).all()
    with pytest.raises(ShimError, match="thread 0: returns while copies to shared memory are under way"):
        run("copied", given, np.zeros((2, 16), np.uint8), size=size, shared=16, variant=1)


@pytest.mark.slow  # builds with sanitizers
@pytest.mark.parametrize(("variant", "seen"), [(0, None), (1, "heap-buffer-overflow"), (2, "misaligned address")])
def test_sanitizers_see_shared_memory(variant, seen):
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libstdc++")
    ]
    if not all(Path(name).is_absolute() for name in runtimes):
        pytest.skip("the compiler has no AddressSanitizer")
    launch = f"None, t.np.zeros(32, 'u4'), size=8, shared=32, variant={variant}"
    code = f"import test_cuda_shim as t; t.run('read_vector', {launch})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"HAPPYHORSE_FAST_SANITIZE": "1", "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ":".join(runtimes)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if seen is None:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode != 0
        assert seen in result.stderr and "shim_kernels.cu" in result.stderr


# What a launch may be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 288}, "threads must be a multiple of 32 up to 256, got 288"),
        ({"threads": 48}, "threads must be a multiple of 32 up to 256, got 48"),
        ({"threads": 0}, "threads must be a multiple of 32 up to 256, got 0"),
        ({"shared": 232_449}, "shared memory must be at most 232448 bytes, got 232449"),
        ({"grid": (1, 0, 1)}, "no side of the grid may be 0"),
        ({"grid": (1, 65_536, 1)}, "the grid's y and z must be at most 65535"),
        ({"params": ctypes.c_int(0)}, "params are 4 bytes, the kernel's struct has 24"),
    ],
)
def test_launches_that_no_device_takes(change, message):
    launch = {"params": ShimParams(), "grid": (1, 1, 1), "threads": 32, "shared": 0}
    SHIM("shim_kernels", "one_has_returned", *launch.values())
    with pytest.raises(ShimError, match=message):
        SHIM("shim_kernels", "one_has_returned", *(launch | change).values())


# Exchanges ------------------------------------------------------------------------------------------------------------


def test_exchanges():
    x = np.random.default_rng(0).integers(0, 1000, 32).astype(np.int32)
    lanes = np.arange(32)
    multiples = x % 3 == 0
    wanted = [
        x[::-1],
        x[lanes ^ 5],
        np.full(32, int((multiples.astype(np.uint64) << lanes.astype(np.uint64)).sum()))
        .astype(np.uint32)
        .view(np.int32)[:32],
        np.full(32, x.sum()),
        np.full(32, x[7]),
        np.cumsum(multiples) - multiples,
    ]
    for out in in_orders("exchanges", x, np.zeros((6, 32), np.int32)):
        for name, a, b in zip(("shfl", "xor", "ballot", "add", "64 bits", "below"), out, wanted, strict=True):
            assert (a == b).all(), name


def test_a_shuffle_one_lane_off_changes_the_result():
    given = np.arange(1, 65, dtype=np.int32)
    wanted = given.reshape(2, 32).cumsum(axis=1).reshape(-1)
    for out in in_orders("prefix_sums", given, np.zeros_like(given), threads=64):
        assert (out == wanted).all()
    for out in in_orders("prefix_sums", given, np.zeros_like(given), threads=64, variant=1):
        assert (out != wanted).any()


@pytest.mark.parametrize("warps", [1, 2, 8])
def test_sums_over_a_block(warps):
    threads = 32 * warps
    x = np.random.default_rng(warps).integers(0, 2**41, threads).astype(np.uint64)
    low = (x & 0xFFFF).reshape(warps, 32).sum(axis=1)
    wanted = np.stack(
        [np.full(threads, x.sum()), np.repeat(low.cumsum() - low, 32), np.full(threads, low.sum())], axis=1
    )
    for out in in_orders("block_sums", x, np.zeros((threads, 3), np.uint64), threads=threads, shared=32 * 12):
        assert (out == wanted).all()


# Tensor cores ---------------------------------------------------------------------------------------------------------


def product(variant, seed=0):
    """(a . b + c of the kernel in every order, and of numpy): small integers, exact in any order of summation."""
    random = np.random.default_rng(seed)
    a, b = (random.integers(-8, 9, (16, 16)).astype(np.float32) for _ in range(2))
    c = random.integers(-99, 99, (16, 16)).astype(np.float32)
    given = (np.stack([a, b]).view(np.uint32) >> 16).astype(np.uint16)
    return in_orders("product", given, c, variant=variant, shared=1024), a @ b + c


@pytest.mark.parametrize("variant", [0, 1], ids=["fragments", "ldmatrix"])
def test_products_of_matrices(variant):
    for seed in range(3):
        results, wanted = product(variant, seed)
        assert all((x == wanted).all() for x in results)


def test_a_matrix_that_is_not_transposed_changes_the_product():
    results, wanted = product(2)
    assert all((x != wanted).any() for x in results)


@pytest.mark.parametrize(
    ("start", "shared", "message"),
    [(8, 64, "a row must be aligned to 16 bytes"), (64, 64, "a row outside shared memory")],
)
def test_rows_that_ldmatrix_cannot_load(start, shared, message):
    run("load_rows", None, np.zeros(32, np.uint32), size=48, shared=shared)
    with pytest.raises(ShimError, match=f"ldmatrix_x4 at shim_kernels.cu:{line('ldmatrix')}: {message}"):
        run("load_rows", None, np.zeros(32, np.uint32), size=start, shared=shared)


# Numbers --------------------------------------------------------------------------------------------------------------


def numbers(variant, given, dtype):
    given = np.ascontiguousarray(given)
    return run("numbers", given, np.zeros(given.size, dtype), variant=variant, size=given.size)


def same_bits(ours, wanted, nan):
    """Equal bits, and NaN where ``wanted`` is NaN, in the one form that the instruction gives."""
    wanted_nan = wanted.float().isnan()
    bits = torch.from_numpy(ours.view(np.int8 if wanted.element_size() == 1 else f"i{wanted.element_size()}"))
    theirs = wanted.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[wanted.element_size()])
    return bool((torch.where(wanted_nan, nan, theirs) == bits).all())


def around(values):
    """float32 values, and their neighbours on both sides."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return np.concatenate([bits, bits + 1, bits - 1]).view(np.float32)


def near_every_bf16():
    """Every bf16, both neighbours in float32, and every midpoint between two of them with its neighbours."""
    codes = np.arange(2**16, dtype=np.uint32) << 16
    return np.concatenate([around(codes.view(np.float32)), around((codes | 0x8000).view(np.float32))])


def near_every_e4m3():
    """Every code, midpoint and neighbour of one, of both signs; and a value with every upper half of float32."""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(E4M3).double().numpy()
    places = np.concatenate([codes, (codes[:-1] + codes[1:]) / 2, [464.0, 480.0, 1e30, 2.0**-10, 2.0**-11]])
    near = around(places.astype(np.float32)[places > 0])
    return np.concatenate([np.zeros(1, np.float32), near, -near, near_every_bf16()])


def test_every_bf16_is_rounded_as_torch_rounds():
    given = near_every_bf16()
    assert np.isnan(given).any() and np.isinf(given).any() and (np.abs(given[given != 0]) < 2.0**-126).any()
    assert same_bits(numbers(0, given, np.uint16), torch.from_numpy(given).bfloat16(), nan=0x7FFF)


def test_every_e4m3_is_rounded_as_torch_rounds():
    given = near_every_e4m3()
    wanted = torch.from_numpy(given).clamp(-448, 448).to(E4M3)
    assert len(wanted.view(torch.uint8).unique()) == 256  # NaN of both signs
    assert same_bits(numbers(1, given, np.uint8), wanted, nan=0x7F)


def test_every_code_has_its_value():
    halves, codes = np.arange(2**16).astype(np.uint16), np.arange(2**8).astype(np.uint8)
    assert (numbers(2, halves, np.uint32) == halves.astype(np.uint32) << 16).all()
    assert same_bits(numbers(3, codes, np.uint32), torch.from_numpy(codes).view(E4M3).float(), nan=0x7FFFFFFF)


def test_int8_codes_are_rounded_to_the_nearest_even_and_clamped():
    ties = np.arange(1, 257, dtype=np.float32) / 2
    x = torch.from_numpy(np.concatenate([np.zeros(1, np.float32), around(ties), around(-ties)]))
    fours = torch.stack([x, -x, 2 * x, 0.5 * x], dim=1).round().clamp(-127, 127).to(torch.int8)
    assert (numbers(9, x.numpy(), np.int32) == fours.view(torch.int32).flatten().numpy()).all()


def test_scales_and_norms_are_float32_step_by_step():
    given = np.random.default_rng(0).lognormal(sigma=8.0, size=10_000).astype(np.float32)
    given[:3] = 0.0, 1e-45, 448.0
    for variant, largest in ((4, 448), (10, 127)):
        scale = np.maximum(given * np.float32(1 / largest), np.float32(2.0**-96))
        assert (numbers(variant, given, np.float32) == scale).all()
    # numpy's, since torch's square roots and quotients of vectors are off by a last bit here and there.
    inverse = np.float32(1) / np.sqrt(given / np.float32(5120) + np.float32(1e-6))
    assert (numbers(5, given, np.float32) == inverse).all()


def test_packed_values_lie_as_in_memory():
    given = np.random.default_rng(1).normal(scale=50, size=1000).astype(np.float32)
    x = torch.from_numpy(given)
    pairs = torch.stack([x, -x], dim=1).bfloat16().view(torch.int32).flatten()
    assert (numbers(6, given, np.int32) == pairs.numpy()).all()
    fours = torch.stack([x, -x, 2 * x, 0.5 * x], dim=1).to(E4M3).view(torch.int32).flatten()
    assert (numbers(7, given, np.int32) == fours.numpy()).all()
    bits = given.view(np.uint32)
    assert (numbers(8, given, np.uint32) == (bits << 16) ^ (bits & 0xFFFF0000)).all()
