"""What the tests of the products with their epilogue beside the tensor cores share: their launch in the emulator."""

from __future__ import annotations

import contextlib
from unittest import mock

from gluon_emulator import Emulated

from bench.hopper import HOPPER, running
from happyhorse_fast.ops.linear import triton as linear
from happyhorse_fast.ops.qkv import triton as qkv
from happyhorse_fast.ops.runtime.triton import device

SHARED = ("hopper_ring", "product_beside")


@contextlib.contextmanager
def emulated(launcher, modules, kernel, seed, replace, programs, impl=HOPPER):
    """On the CPU, ``launcher`` launches what ``impl`` would on sm_90 with so many multiprocessors, emulated."""
    stand_in = Emulated((*SHARED, *modules), kernel, seed, replace)
    counted = mock.patch.object(device, "counted_multiprocessors", return_value=programs)
    with running(impl), device.pretend(90), counted, mock.patch.object(launcher, kernel, stand_in):
        yield


def residual_beside(seed=1, replace=(), programs=4, impl=HOPPER):
    """`fp8_linear_residual` in the kernel of `kernels/residual_beside.py`, unless another ``impl`` is asked for."""
    return emulated(linear, ["residual_beside"], "fp8_linear_residual_beside_kernel", seed, replace, programs, impl)


def activation_beside(seed=1, replace=(), programs=4):
    """`fp8_linear_activation` in the kernel of `kernels/activation_beside.py`."""
    return emulated(linear, ["activation_beside"], "fp8_linear_activation_beside_kernel", seed, replace, programs)


def qkv_beside(seed=1, replace=(), programs=4):
    """`qkv_linear` in the kernel of `kernels/qkv_beside.py`."""
    return emulated(qkv, ["qkv_heads", "qkv_pieces", "qkv_beside"], "qkv_linear_beside_kernel", seed, replace, programs)


RELEASE_LAST = "        mbarrier.arrive(ring.empty.index(use % SLOTS), count=1)\n"
FINISHED = "        acc = finished(acc, product)\n"
PLACE = "            sums.tiles.index(GROUP * HALVES + half).store(value.to(product.kept_type))\n"
FULL = "        mbarrier.arrive(sums.full.index(GROUP), count=1)\n"
GIVEN = "            if half == 0:\n                mbarrier.arrive(sums.full.index(GROUP), count=1)\n"
AWAIT_EMPTY = "        mbarrier.wait(sums.empty.index(GROUP), (turn & 1) ^ 1)\n"
LOOP_RELEASE = "            mbarrier.arrive(ring.empty.index((use - 1) % SLOTS), count=1)\n"
AWAIT_FULL = "    mbarrier.wait(ring.full.index(slot), use // SLOTS & 1)\n    if product.parts == 1:\n        left"
FILL = "            mbarrier.wait(ring.empty.index(slot), (use // SLOTS & 1) ^ 1)\n"
PRODUCT_BUGS = {
    "no fence": ("    fence_async_shared()\n", ""),
    "slot not awaited": (AWAIT_FULL, "    if product.parts == 1:\n        left"),
    "wrong parity, full": (AWAIT_FULL, AWAIT_FULL.replace("use // SLOTS & 1", "(use // SLOTS & 1) ^ 1")),
    "slot filled before it is empty": (FILL, ""),
    "wrong parity, empty": (FILL, FILL.replace(" ^ 1", "")),
    "slot released too early": (LOOP_RELEASE, LOOP_RELEASE.replace("(use - 1)", "use")),
    "slot never released": (LOOP_RELEASE, ""),
    "last slot never released": (RELEASE_LAST, ""),
    "last slot released too early": (FINISHED + RELEASE_LAST, RELEASE_LAST + FINISHED),
    "one reader": ("make_barriers(SLOTS, GROUPS)", "make_barriers(SLOTS, 1)"),
    "three readers": ("make_barriers(SLOTS, GROUPS)", "make_barriers(SLOTS, 3)"),
    "bytes of one group": ("GROUPS * x.block_type.nbytes", "x.block_type.nbytes"),
    "the other group's rows": ("slot * GROUPS + GROUP)", "slot * GROUPS)"),
    "another expert's features": ("channel = expert * product.features + feature", "channel = feature"),
    "a step too few": ("range(1, product.steps)", "range(2, product.steps)"),
    "sums stored before the tile before was read": (AWAIT_EMPTY, ""),
    "wrong parity, sums empty": (AWAIT_EMPTY, AWAIT_EMPTY.replace(" ^ 1", "")),
    "sums given before they are stored": (PLACE + FULL, GIVEN + PLACE),
    "sums never given": (FULL, ""),
    "a group's sums in the other's place": ("index(GROUP * HALVES + half)", "index((1 - GROUP) * HALVES + half)"),
    "sums read before they are there": ("    mbarrier.wait(sums.full.index(group), turn & 1)\n", "    pass\n"),
    "wrong parity, sums full": ("index(group), turn & 1)", "index(group), (turn & 1) ^ 1)"),
    "sums never released": ("    mbarrier.arrive(sums.empty.index(group), count=1)\n", "    pass\n"),
    "turn forgotten": (FULL + "        turn += 1\n", FULL),
    "halves for groups": ("(group * HALVES + half) * PIECES", "(half * HALVES + group) * PIECES"),
}
"""Bugs of `kernels/product_beside.py`, by their text."""
WHOLE_BUGS = {"sums not waited for": ("(warpgroup_mma_wait(0, deps=[acc[0]])", "(warpgroup_mma_wait(1, deps=[acc[0]])")}
CODE_BUGS = {"not as large again": ("return 2.0**self.exponent", "return 1.0")}
INT8_BUGS = {
    "the other part's features": ("slot * product.parts + PART)", "slot * product.parts)"),
    "sums not waited for": ("warpgroup_mma_wait(0, deps=[acc[0], acc", "warpgroup_mma_wait(1, deps=[acc[0], acc"),
    "one part awaited": ("warpgroup_mma_wait(2, deps", "warpgroup_mma_wait(3, deps"),
    "one part twice": ("    else:\n        return acc\n", "    else:\n        return acc[0], acc[0]\n"),
}
