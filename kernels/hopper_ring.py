"""Rings of tiles in shared memory, between one warp that loads and warp groups that compute: Gluon, for Hopper.

A slot is full when its "full" mbarrier has counted the bytes of its tiles. It is empty again when every computing group
has arrived at its "empty" mbarrier. One thread arrives for its group, after the group's warps have synchronized. That
costs a barrier, so k and v share one arrival per step. Named barriers, at which each warp arrives for itself, are
cheaper and failed: as soon as several processes shared an H200, tiles were overwritten while they were read
(docs/kernels/attention.md).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


class Ring(NamedTuple):
    """Slots of tiles in shared memory, each with one mbarrier for "full" and one for "empty"."""

    tiles: Any
    full: Any
    empty: Any


class Rings(NamedTuple):
    """The rings of q, k and v. k and v share ``empty``: one arrival frees k of a block and v of the block before.

    ``open`` is an mbarrier that nobody arrives at.
    """

    q: Any
    k: Any
    v: Any
    open: Any


@gluon.jit
def make_barriers(SLOTS: gl.constexpr, COUNT: gl.constexpr):
    """Allocate and initialize SLOTS mbarriers of COUNT arrivals each."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=COUNT)
    return barriers


@gluon.jit
def make_ring(source, empty, TILES: gl.constexpr, SLOTS: gl.constexpr):
    """Make a ring of SLOTS slots of TILES tiles of the descriptor ``source``, with mbarriers ``empty`` given."""
    shape: gl.constexpr = [SLOTS * TILES] + source.block_type.shape  # noqa: RUF005 - Triton knows no star
    tiles = gl.allocate_shared_memory(source.dtype, shape, source.layout)
    return Ring(tiles, make_barriers(SLOTS, 1), empty)


@gluon.jit
def fill(ring, use, source, row, column, TILES: gl.constexpr, SLOTS: gl.constexpr, LATER: gl.constexpr = 0):
    """Wait until the slot of the ring's ``use``-th use is empty, then load TILES tiles into it, consecutive in rows.

    LATER is 1 where a slot is released with the next use of the other ring, as v's are, else 0.
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
    """Wait until the tiles of the ring's ``use``-th use have arrived, and return their slot."""
    slot = use % SLOTS
    mbarrier.wait(ring.full.index(slot), use // SLOTS & 1)
    return slot


@gluon.jit
def hold_order(rings):
    """Keep ptxas from moving instructions across this point: a wait is a loop, and nothing moves across a loop.

    The wait ends at once, since it is for the phase before the barrier's first.
    """
    mbarrier.wait(rings.open.index(0), 1)


@gluon.jit
def release(ring, slot):
    """Arrive for this group at a slot's "empty" mbarrier; in k's ring this also frees v of the block before."""
    mbarrier.arrive(ring.empty.index(slot), count=1)
