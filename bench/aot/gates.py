"""Gates of a compiled kernel, and the rows that say what it does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bench.aot.disassembly import Compiled, Turn
from happyhorse_fast.kernels.launch import FP_FUSION, LaunchConfig, illegal, table
from happyhorse_fast.ops.quantize import ATTENTION, FORMATS

MOST_REGISTERS = 255
KEEP_NAN = ("linear", "qkv", "row_quantization")
"""Launch tables of kernels whose every minimum and maximum of float32 must keep NaN."""
CLAMPS = re.compile("swiglu7|gelu7|fp8 out|int8 out|int8_qk out|fp8_v out|Hadamard")
"""In the details of those that have one."""
MAY_SPILL = {("qkv", 100), ("qkv", 120), ("attention", 100)}
"""Launch tables that have no configuration without spills for an architecture yet; never sm_90."""
EXPONENTS = 64
"""Exponents of a thread per step of attention's Hopper kernel: 64 x 128 by 128 threads."""
TURNS = {False: 4, True: 6}
"""In its loops: of two groups, each in its loop over full blocks, where e4m3 P has two, and that over partial ones."""
BEHIND_PV = 112
"""Instructions that may stand between PV and the next QK in e4m3, where PV is added to the accumulator: 64 and 48."""
GROUP_THREADS = 256
"""Threads of both groups."""
GROUPS, SLOT_PRODUCTS, STORES = 2, 4, 16
"""Of a product with its epilogue beside: groups that multiply, a slot's products of 32 bytes, and a group's STSM."""
RESERVED = 4
"""Named barriers that Triton may use for itself in a kernel of three partitions."""
PRODUCTS = {fmt: {FORMATS[of_qk], FORMATS[of_v]} for fmt, (of_qk, of_v) in ATTENTION.items()}
PRODUCTS |= {"int8": {"int8"}, "none": set()}
"""Products of a kernel -> formats that are multiplied in it."""
TENSOR_CORES = {
    90: {"bf16": "HGMMA", "int8": "IGMMA", "fp8": "QGMMA"},
    100: {"bf16": "UTCHMMA", "int8": "IMMA", "fp8": "UTCQMMA"},
}
"""Instructions of the generations that have their own; for int8 on sm_100 Triton takes the old one before 3.8."""


@dataclass(frozen=True)
class Order:
    """In which order the instructions of attention's Hopper kernel stand.

    Attributes:
        exponents: At each place, how many stand beside products that are under way.
        turns: Of all loops.
        barriers: Numbers of named barriers, and the threads that meet there, 0 for all.
        behind_pv: Most instructions between PV and the next QK in loops over full blocks; 0 where none is found.
        overwritten: Instructions that write what a product under way reads.
    """

    exponents: list[int]
    turns: list[Turn]
    barriers: list[tuple[int, int]]
    behind_pv: int = 0
    overwritten: int = 0


@dataclass(frozen=True)
class Beside:
    """What a kernel with its epilogue beside the tensor cores is made of.

    Attributes:
        loops: Of each loop over slots, its products, and how many batches of them each wait leaves under way.
        loads: Bytes that each load from memory has of a thread.
        stores: Those of each store.
        overwritten: Instructions that write what a product under way adds to.
    """

    loops: list[tuple[int, list[int]]]
    loads: list[int]
    stores: list[int]
    overwritten: int = 0


@dataclass(frozen=True, kw_only=True)
class Row(Compiled):
    """A compiled kernel of Triton's, and how it was launched.

    Attributes:
        stem: Stem of its launch table.
        variant: Entry of the launch table.
        detail: What tells the case from the op's others.
        arch: Compute capability.
        config: The committed configuration.
        tile: Sizes of its blocks, as launched.
        num_warps: Warps of a program, as launched.
        num_stages: Depth of the pipeline, as launched.
        fp_fusion: Whether a * b + c may become one rounding.
        products: Format of its products: a key of :data:`PRODUCTS`.
        triton: Version that compiled it.
        step: Instructions in attention's step over a full block; 0 in other kernels.
        order: Of attention's Hopper kernel alone.
        beside: Of a product's Hopper kernel alone.
        pointers: Arguments that are pointers, by name.
        nan_kept: Minima and maxima of floating numbers in its PTX that give NaN where an operand is.
        nan_lost: Those that give the other operand.
    """

    stem: str
    variant: str
    detail: str
    arch: int
    config: LaunchConfig
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    fp_fusion: bool
    products: str
    triton: str
    step: int = 0
    order: Order | None = None
    beside: Beside | None = None
    pointers: tuple[str, ...] = ()
    nan_kept: int = 0
    nan_lost: int = 0

    @property
    def name(self) -> str:
        """The same in every version."""
        return f"sm_{self.arch} {self.kernel.removesuffix('_kernel')} {self.detail}"

    @property
    def wanted(self) -> list[str]:
        """The tensor-core instructions that it must have, and no others."""
        names = TENSOR_CORES.get(self.arch, {"bf16": "HMMA", "int8": "IMMA", "fp8": "QMMA"})
        if self.arch == 100 and tuple(map(int, self.triton.split(".")[:2])) >= (3, 8):
            names = names | {"int8": "UTCIMMA"}
        return sorted(names[fmt] for fmt in PRODUCTS[self.products])


def resources(kernel: Compiled, tensor_cores: Iterable[str], *, may_spill: bool = False) -> list[str]:
    """Gates of any kernel that it fails: registers, its tensor-core instructions and no others, no stack, no spills."""
    found, wanted = [], list(tensor_cores)
    if kernel.registers > MOST_REGISTERS:
        found.append(f"{kernel.registers} registers, at most {MOST_REGISTERS} allowed")
    if list(kernel.tensor_core) != wanted:
        used = ", ".join(kernel.tensor_core) or "none"
        found.append(f"tensor-core instructions {used}, not {', '.join(wanted) or 'none'}")
    if kernel.stack and not may_spill:
        found.append(f"{kernel.stack} bytes of stack")
    stores, loads = kernel.opcodes["STL"], kernel.opcodes["LDL"]
    if (stores or loads) and not may_spill:
        found.append(f"spills: {stores} STL, {loads} LDL")
    return found


def problems(row: Row) -> list[str]:
    """Gates that a row fails, each in a line; empty where it holds all.

    No stack and no spills, but for :data:`MAY_SPILL`; it fits the device; its configuration is legal and is the one it
    was launched with; its listing has the tensor-core instructions of its format and no others; where its configuration
    says so, the memory adds, and there is no other way to the result; activations and casts keep NaN. (Triton may take
    others without a word: e4m3 as bf16 with max_num_imprecise_acc=0, sm_80's instructions on sm_100 with 16 warps.)

    In attention's Hopper kernel a block's exponents stand beside products of its group, a group passes its turn once,
    behind its last product, and nothing writes what a product under way reads. In e4m3 little stands between PV and the
    next QK.

    With an epilogue beside the tensor cores each of two groups has a loop whose one wait leaves a slot's products under
    way, sums cross by 16 STSM a group, and a residual is loaded and stored, an activation stored 16 bytes a thread at a
    time.
    """
    found, config = [], row.config
    fp8 = "fp8" in PRODUCTS[row.products]
    if (why := illegal(config, row.arch, fp8=fp8, shared_bytes=row.shared)) is not None:
        found.append(why)
    if (row.num_warps, row.num_stages) != (config.num_warps, config.num_stages):
        found.append(f"launched with {row.num_warps} warps and {row.num_stages} stages, not as {row.variant!r} says")
    committed = {name: getattr(config, name) for name in row.tile}
    if row.tile != committed:
        found.append(f"launched with tiles {row.tile}, not {committed} as {row.variant!r} says")
    if row.fp_fusion != FP_FUSION:
        found.append("launched without enable_fp_fusion=FP_FUSION")
    found += resources(row, row.wanted, may_spill=(row.stem, row.arch) in MAY_SPILL)
    if row.order:
        found += _out_of_order(row.order, e4m3=fp8)
    if row.beside:
        found += _not_beside(row)
    reduces, stores = row.opcodes["UTMAREDG"], row.opcodes["STG"]
    reducing = config.reduce and not row.detail.endswith("pointers")
    if bool(reduces) != reducing:
        found.append(f"{reduces} additions by the memory, {'some' if reducing else 'none'} wanted")
    if reducing and (stores or "out" in row.pointers):
        found.append(f"{stores} STG and pointers {', '.join(row.pointers)} beside additions by the memory")
    if row.stem in KEEP_NAN and (row.nan_lost or (CLAMPS.search(row.detail) and not row.nan_kept)):
        found.append(f"{row.nan_lost} minima and maxima that lose NaN, {row.nan_kept} that keep it")
    return [f"{row.name}, Triton {row.triton}: {problem}" for problem in found]


def _out_of_order(order: Order, *, e4m3: bool) -> list[str]:
    found = []
    beside, wanted = sum(n >= EXPONENTS for n in order.exponents), TURNS[e4m3]
    if beside < wanted:
        found.append(f"{beside} steps with {EXPONENTS} exponents beside products, {wanted} wanted")
    if len(order.turns) != wanted:
        found.append(f"{len(order.turns)} turns, {wanted} wanted")
    for before, behind, passes in order.turns:
        if not before or behind or passes != 1:
            found.append(f"a turn of {before} products, passed {passes} times, with {behind} behind it")
    if e4m3 and not 0 < order.behind_pv <= BEHIND_PV:
        found.append(f"{order.behind_pv} instructions between PV and the next QK, at most {BEHIND_PV} allowed")
    if order.overwritten:
        found.append(f"{order.overwritten} instructions that write what a product under way reads")
    own = [barrier for barrier in order.barriers if barrier[0] >= RESERVED]
    if (len(own), *{threads for _, threads in own}) != (2, GROUP_THREADS):
        found.append(f"named barriers {own}, not two of both groups")
    return found


def _not_beside(row: Row) -> list[str]:
    beside, found = row.beside, []
    assert beside is not None
    parts = 2 if row.products == "int8" else 1  # of 128 features: Triton has no product of int8 with 256
    wanted = [(SLOT_PRODUCTS * parts, [parts])] * GROUPS
    if beside.loops != wanted:
        found.append(f"loops over slots of (products, left under way) {beside.loops}, not {wanted}")
    if beside.overwritten:
        found.append(f"{beside.overwritten} instructions that write what a product under way adds to")
    if row.opcodes["STSM"] != STORES * GROUPS:
        found.append(f"{row.opcodes['STSM']} STSM, {STORES * GROUPS} wanted")
    adds = "residual" in row.detail
    if (adds or "activation" in row.kernel) and set(beside.stores) != {16}:
        found.append(f"stores of {beside.stores} bytes")
    if adds and beside.loads.count(16) < len(beside.stores):
        found.append(f"loads of {beside.loads} bytes for {len(beside.stores)} stores")
    return found


def not_compiled(rows: Iterable[Row]) -> list[str]:
    """Entries of the launch tables that no row was launched with."""
    rows = list(rows)
    reached = {(row.stem, row.variant, row.arch) for row in rows}
    stems = sorted({row.stem for row in rows})
    listed = {(stem, variant, int(arch)) for stem in stems for variant, of in table(stem).items() for arch in of}
    return [
        f"{stem} {variant!r} for sm_{arch}: no case launches it" for stem, variant, arch in sorted(listed - reached)
    ]
