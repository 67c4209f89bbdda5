"""Rings of tiles in shared memory, between one warp that loads and warp groups that compute: Gluon, for Hopper.

A slot is full when its mbarrier has counted the bytes of its tiles. It is empty again when every group has said so at
another: one thread arrives after its group's warps have met, and since that costs, k and v share one arrival a step. At
named barriers, where each warp arrives for itself and goes on, tiles were overwritten while they were read as soon as
several processes shared an H200 (docs/kernels/attention.md).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

Q_SLOTS = gl.constexpr(2)
"""Items whose queries fit at once: the next one's arrive while this one is computed."""


class Ring(NamedTuple):
    """Slots, and for each an mbarrier that says it is full and one that says it is empty."""

    tiles: Any
    full: Any
    empty: Any


class Rings(NamedTuple):
    """Of queries, k and v. k and v share ``empty``: a step ends with k of its block and v of the one before."""

    q: Any
    k: Any
    v: Any


@gluon.jit
def make_barriers(SLOTS: gl.constexpr, COUNT: gl.constexpr):
    """SLOTS mbarriers, each of COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=COUNT)
    return barriers


@gluon.jit
def make_ring(source, empty, TILES: gl.constexpr, SLOTS: gl.constexpr):
    """SLOTS slots of TILES tiles as the descriptor ``source`` loads them; ``empty`` are mbarriers of the slots."""
    shape: gl.constexpr = [SLOTS * TILES] + source.block_type.shape  # noqa: RUF005 - Triton knows no star
    tiles = gl.allocate_shared_memory(source.dtype, shape, source.layout)
    return Ring(tiles, make_barriers(SLOTS, 1), empty)


@gluon.jit
def fill(ring, use, source, row, column, TILES: gl.constexpr, SLOTS: gl.constexpr, LATER: gl.constexpr = 0):
    """Load TILES tiles below each other for the ring's ``use``-th use, once its slot is empty.

    LATER: 1 where a use ends with the step after its own, as v's does.
    """
    step = use + LATER
    mbarrier.wait(ring.empty.index(step % SLOTS), (step // SLOTS & 1) ^ 1)
    slot = use % SLOTS
    full = ring.full.index(slot)
    mbarrier.expect(full, TILES * source.block_type.nbytes)
    for tile in gl.static_range(TILES):
        place = [row + tile * source.block_type.shape[0], column]
        tma.async_copy_global_to_shared(source, place, full, ring.tiles.index(slot * TILES + tile))


@gluon.jit
def await_full(ring, use, SLOTS: gl.constexpr):
    """Wait until the tiles of the ring's ``use``-th use are there; returns their slot."""
    slot = use % SLOTS
    mbarrier.wait(ring.full.index(slot), use // SLOTS & 1)
    return slot


@gluon.jit
def release(ring, slot):
    """Say that this reader is done with a slot; in k's ring also with v of the block before."""
    mbarrier.arrive(ring.empty.index(slot), count=1)
