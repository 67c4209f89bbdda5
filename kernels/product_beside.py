"""x . weight for Hopper in Gluon, with its epilogue beside the tensor cores: what such kernels share.

A program walks tiles of 128 rows of one expert by 256 features, in the order of `kernels/linear.py`. Its 384 threads
have four roles:

- One warp loads a ring of 3 slots of 48 KiB through TMA: 128 bytes of the inputs of 128 rows and of 256 features.
- Two groups of four warps multiply 64 rows each. At a tile's end a group rounds its sums to 16 bits, stores them to
  shared memory, and goes on with the next tile, whose first slots are there.
- Two warps finish the tile before, by a function of the kernel. They have a tile's whole loop for it, 41,000 cycles in
  fp8 at K = 5,120.

Sums of codes cross as float16, after a power of two that keeps the largest possible sum in range; sums of bf16 as bf16,
which the result rounds to in any case.

With 512 threads ptxas has 128 registers a thread, and refuses a product of 64 x 256. docs/notes/hopper.md has
predictions and outcomes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from happyhorse_fast.kernels import numerics
from happyhorse_fast.kernels.hopper_ring import make_barriers

grouped_tile = gluon.jit(numerics.grouped_tile.fn)

SOURCE = gl.constexpr(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
"""Of this file: as of `hopper_sizes`, for Triton's cache, which does not know the source of a property."""
GROUPS = gl.constexpr(2)
"""Warp groups that multiply."""
ROWS = gl.constexpr(64)
"""Rows of a tile that a group multiplies."""
COLUMNS = gl.constexpr(256)
"""Features of a tile."""
HALVES = gl.constexpr(2)
HALF = gl.constexpr(128)
"""Features that are stored and finished at once: a head."""
PIECE = gl.constexpr(16)
PIECES = gl.constexpr(4)
"""Rows that are finished at once, and how often a group has as many: 2,048 sums, 32 in each of 64 threads."""
FINISH_WARPS = gl.constexpr(2)
MULTIPLY_REGISTERS = gl.constexpr(184)
FINISH_REGISTERS = gl.constexpr(136)
"""Registers per thread. The loading warp and those that finish are one group of 128: 2 x 128 x 184 + 128 x 136 of an
SM's 65,536, of which 384 threads can have 168 each."""
EVEN_REGISTERS = gl.constexpr(168)
"""Per thread of every role, where the finishing warps load ahead: with 136 for them, a piece's residuals or the phases
of QKV do not fit, and 168 are enough for a product of 64 x 256."""


@dataclass(frozen=True)
class Product:
    """Compile-time constants of a product: ``features`` of an expert, ``k`` inputs, of ``bits`` bits."""

    features: int
    k: int
    bits: int
    int8: bool
    slots: int
    group_m: int

    @property
    def chunk(self) -> Any:
        """Inputs of a slot: 128 bytes."""
        return 1024 // self.bits

    @property
    def steps(self) -> Any:
        """Slots of a tile. TMA fills with zeros what the last of them has past ``k``."""
        return -(-self.k // self.chunk)

    @property
    def column_tiles(self) -> Any:
        """Column tiles of an expert."""
        return -(-self.features // 256)

    @property
    def parts(self) -> Any:
        """Products that a group computes of a slot: Triton has none of int8 with 256 features at once."""
        return 2 if self.int8 else 1

    @property
    def part(self) -> Any:
        """Features of one of them."""
        return 256 // self.parts

    @property
    def sum_type(self) -> Any:
        """Element type of sums."""
        return gl.int32 if self.int8 else gl.float32

    @property
    def kept_type(self) -> Any:
        """Element type of sums as they cross to the finishing warps."""
        return gl.bfloat16 if self.bits == 16 else gl.float16

    @property
    def exponent(self) -> int:
        """Sums of codes cross as sum * 2^-exponent: the largest possible one is then below 65,504."""
        largest = self.k * (127**2 if self.int8 else 448**2)
        return max(0, (largest // 65504).bit_length()) if self.bits == 8 else 0

    @property
    def down(self) -> float:
        """2^-exponent, by which sums are multiplied before they cross."""
        return 2.0**-self.exponent

    @property
    def up(self) -> float:
        """2^exponent, by which those that have crossed are multiplied."""
        return 2.0**self.exponent

    @property
    def layout(self) -> Any:
        """Layout of a group's sums."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.part, 256 // self.bits])

    def crossing(self, rows: Any, read: Any) -> Any:
        """Layout of ``rows`` of a half in shared memory, of which a thread reads ``read`` adjacent columns.

        The address of 8 columns is XORed by the row, so that STSM meets every bank once, and where a thread reads more
        than 8, 128 bytes on also by 1 or 2: so do then the 8 threads of a 16-byte load, which skip columns.
        """
        of_rows = [[1, 8], [2, 16], [4, 32], [8, 0], [16, 0], [32, 0]]
        of_columns = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [0, 64 + read // 16 * 8]]
        return gl.SharedLinearLayout(of_columns + [basis for basis in of_rows if basis[0] < rows])


@gluon.constexpr_function
def product_of(*values):
    """Make one compile-time value of a product's constants."""
    _ = SOURCE  # which makes it a part of the kernel's key
    return Product(*values)


class Ring(NamedTuple):
    """Slots of operands in shared memory: ``x`` has a tile per group, ``weight`` one per part of a product."""

    x: Any
    weight: Any
    full: Any
    empty: Any


class Sums(NamedTuple):
    """A tile's sums in shared memory, with a "full" and an "empty" mbarrier per group.

    ``tiles`` are the HALVES of a group's, ``pieces`` the PIECES of each: rows of the same memory.
    """

    tiles: Any
    pieces: Any
    full: Any
    empty: Any


class Work(NamedTuple):
    """The work of a launch: its row tiles, how many there are, and how many tiles of the product."""

    row_tiles: Any
    tiles: Any
    items: Any


@gluon.jit
def make_operands(x, weight, product: gl.constexpr):
    """Make the ring of operands of two descriptors, of 64 rows and of a part of 256 features."""
    SLOTS: gl.constexpr = product.slots
    a = gl.allocate_shared_memory(x.dtype, [SLOTS * GROUPS, ROWS, product.chunk], x.layout)
    b = gl.allocate_shared_memory(weight.dtype, [SLOTS * product.parts, product.part, product.chunk], weight.layout)
    return Ring(a, b, make_barriers(SLOTS, 1), make_barriers(SLOTS, GROUPS))


@gluon.jit
def make_sums(product: gl.constexpr, READ: gl.constexpr):
    """Make the buffer in which sums cross. A thread that finishes them reads READ columns of a row, 4 to 32."""
    stored: gl.constexpr = product.crossing(ROWS, READ)
    read: gl.constexpr = product.crossing(PIECE, READ)
    tiles = gl.allocate_shared_memory(product.kept_type, [GROUPS * HALVES, ROWS, HALF], stored)
    pieces = tiles._reinterpret(product.kept_type, [GROUPS * HALVES * PIECES, PIECE, HALF], read)
    return Sums(tiles, pieces, make_barriers(GROUPS, 1), make_barriers(GROUPS, 1))


@gluon.jit
def tile_of(work, item, product: gl.constexpr):
    """Return (expert, first row, end row, first feature) of a tile."""
    m, n = grouped_tile(item, work.tiles, product.column_tiles, product.group_m)
    entry = work.row_tiles + 3 * m
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), n * COLUMNS


@gluon.jit
def load_operands(x, weight, ring, work, product: gl.constexpr):
    """Load, in the loading warp, the operands of all of a program's tiles, in the order of their use.

    Rows past a row tile's end and features past an expert's are the next one's, or zeros: nobody stores what they give.
    """
    SLOTS: gl.constexpr = product.slots
    PARTS: gl.constexpr = product.parts
    use = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        expert, first, _, feature = tile_of(work, item, product)
        channel = expert * product.features + feature
        for at in range(0, product.k, product.chunk):
            slot = use % SLOTS
            mbarrier.wait(ring.empty.index(slot), (use // SLOTS & 1) ^ 1)
            full = ring.full.index(slot)
            mbarrier.expect(full, GROUPS * x.block_type.nbytes + product.parts * weight.block_type.nbytes)
            for group in gl.static_range(GROUPS):
                place = ring.x.index(slot * GROUPS + group)
                tma.async_copy_global_to_shared(x, [first + group * ROWS, at], full, place)
            for part in gl.static_range(PARTS):
                place = ring.weight.index(slot * PARTS + part)
                tma.async_copy_global_to_shared(weight, [channel + part * product.part, at], full, place)
            use += 1


@gluon.jit
def start_part(GROUP: gl.constexpr, ring, slot, PART: gl.constexpr, acc, ADD: gl.constexpr, product: gl.constexpr):
    """Issue the products of a slot with one part of the features, without waiting for them."""
    a = ring.x.index(slot * GROUPS + GROUP)
    b = ring.weight.index(slot * product.parts + PART).permute((1, 0))
    return warpgroup_mma(a, b, acc, use_acc=ADD, is_async=True)


@gluon.jit
def start(GROUP: gl.constexpr, ring, use, acc, ADD: gl.constexpr, product: gl.constexpr):
    """Await a slot, issue its products, and wait until those of the slot before are done: the sums so far."""
    SLOTS: gl.constexpr = product.slots
    slot = use % SLOTS
    mbarrier.wait(ring.full.index(slot), use // SLOTS & 1)
    if product.parts == 1:
        left = start_part(GROUP, ring, slot, 0, acc[0], ADD, product)
        return (warpgroup_mma_wait(1, deps=[left]),)
    else:
        left = start_part(GROUP, ring, slot, 0, acc[0], ADD, product)
        right = start_part(GROUP, ring, slot, 1, acc[1], ADD, product)
        return warpgroup_mma_wait(2, deps=[left, right])


@gluon.jit
def finished(acc, product: gl.constexpr):
    """Wait for all products."""
    if product.parts == 1:
        return (warpgroup_mma_wait(0, deps=[acc[0]]),)
    else:
        return warpgroup_mma_wait(0, deps=[acc[0], acc[1]])


@gluon.jit
def halves(acc, product: gl.constexpr):
    """Return sums in HALVES. In the tensor core's layout a split only chooses registers: no data moves."""
    if product.parts == 1:
        return gl.split(gl.permute(gl.reshape(acc[0], (ROWS, HALVES, HALF)), (0, 2, 1)))
    else:
        return acc


@gluon.jit
def multiply(GROUP: gl.constexpr, common, product: gl.constexpr):
    """Multiply, as one of the two groups, 64 rows of every tile, and hand their sums to the warps that finish them."""
    ring, sums, work = common
    SLOTS: gl.constexpr = product.slots
    zero = gl.full([ROWS, product.part], 0, product.sum_type, layout=product.layout)
    use = 0
    turn = 0
    for _ in range(gl.program_id(0), work.items, gl.num_programs(0)):
        acc = start(GROUP, ring, use, (zero, zero), False, product)
        for _ in range(1, product.steps):
            use += 1
            acc = start(GROUP, ring, use, acc, True, product)
            mbarrier.arrive(ring.empty.index((use - 1) % SLOTS), count=1)
        acc = finished(acc, product)
        mbarrier.arrive(ring.empty.index(use % SLOTS), count=1)
        use += 1
        mbarrier.wait(sums.empty.index(GROUP), (turn & 1) ^ 1)
        acc = halves(acc, product)
        for half in gl.static_range(HALVES):
            value = acc[half]
            if product.bits == 8:
                value = value.to(gl.float32) * product.down
            sums.tiles.index(GROUP * HALVES + half).store(value.to(product.kept_type))
        mbarrier.arrive(sums.full.index(GROUP), count=1)
        turn += 1


@gluon.jit
def await_sums(sums, group, turn):
    """Wait until a group's sums of the program's ``turn``-th tile are there."""
    mbarrier.wait(sums.full.index(group), turn & 1)


@gluon.jit
def piece_of(sums, group, half, piece, layout: gl.constexpr):
    """Load PIECE rows of a half of a group's sums."""
    return sums.pieces.index((group * HALVES + half) * PIECES + piece).load(layout).to(gl.float32)


@gluon.jit
def release_sums(sums, group):
    """Let a group store its next tile's sums."""
    mbarrier.arrive(sums.empty.index(group), count=1)


@gluon.jit
def finish(FINISH: gl.constexpr, sums, work, given, CONSTANTS: gl.constexpr, product: gl.constexpr):
    """Call FINISH. `warp_specialize` takes no function that a caller passed."""
    FINISH(sums, work, given, CONSTANTS, product)


@gluon.jit
def run(
    x,
    weight,
    work,
    FINISH: gl.constexpr,
    given,
    CONSTANTS: gl.constexpr,
    READ: gl.constexpr,
    MULTIPLY: gl.constexpr,
    REST: gl.constexpr,
    product: gl.constexpr,
):
    """Run the four roles of a program.

    ``FINISH(sums, work, given, CONSTANTS, product)`` finishes every tile, in threads that read READ columns of a row at
    once. A thread of the multiplying groups has MULTIPLY registers, one of the other warps REST.
    """
    ring = make_operands(x, weight, product)
    sums = make_sums(product, READ)
    fence_async_shared()
    common = (ring, sums, work)
    gl.warp_specialize(
        [
            (multiply, (0, common, product)),
            (multiply, (1, common, product)),
            (finish, (FINISH, sums, work, given, CONSTANTS, product)),
            (load_operands, (x, weight, ring, work, product)),
        ],
        [4, FINISH_WARPS, 1],
        [MULTIPLY, REST, REST],
    )
