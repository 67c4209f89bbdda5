"""Gates of a compiled kernel, and the rows that say what it does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bench.aot.disassembly import Compiled, Turn
from happyhorse_fast.kernels.launch import FP_FUSION, LaunchConfig, illegal, table

MOST_REGISTERS = 255
KEEP_NAN = ("linear", "qkv", "row_quantization")
"""Launch tables of kernels whose every minimum and maximum of float32 must keep NaN."""
CLAMPS = re.compile("swiglu7|gelu7|fp8 out|int8 out|int8_qk out|Hadamard")
"""In the details of those that have one."""
MAY_SPILL = {("qkv", 100), ("qkv", 120), ("attention", 100)}
"""Launch tables that have no configuration without spills for an architecture yet; never sm_90."""
EXPONENTS = 64
"""Exponents of a thread per step of the Hopper kernel: 64 x 128 by 128 threads."""
TURNS = 4
"""Its two groups, each in its loop over full blocks and that over partial ones."""
GROUP_THREADS = 256
"""Threads of both groups."""
RESERVED = 4
"""Named barriers that Triton may use for itself in a kernel of three partitions."""
PRODUCTS = {"bf16": ("bf16",), "int8": ("int8",), "fp8": ("fp8",), "int8_qk": ("bf16", "int8"), "none": ()}
"""Products of a kernel -> formats that are multiplied in it."""
TENSOR_CORES = {
    90: {"bf16": "HGMMA", "int8": "IGMMA", "fp8": "QGMMA"},
    100: {"bf16": "UTCHMMA", "int8": "IMMA", "fp8": "UTCQMMA"},
}
"""Instructions of the generations that have their own; for int8 on sm_100 Triton takes the old one before 3.8."""


@dataclass(frozen=True)
class Order:
    """In which order the Hopper kernel's instructions stand.

    Attributes:
        exponents: Of each loop, how many stand beside products that are under way.
        turns: Each loop's.
        barriers: Numbers of named barriers, and the threads that meet there, 0 for all.
        overwritten: Instructions that write what a product under way reads.
        cycles: Of a step over full blocks, played through (bench/aot/playback.py).
    """

    exponents: list[int]
    turns: list[Turn]
    barriers: list[tuple[int, int]]
    overwritten: int = 0
    cycles: float | None = None


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
        order: Of the Hopper kernel alone.
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

    def __str__(self) -> str:
        """Its numbers in a line."""
        spills = f", {self.opcodes['STL']} STL" if self.opcodes["STL"] else ""
        step = f", {self.step} instructions a step" if self.step else ""
        step += f", {self.order.cycles:.0f} cycles played through" if self.order and self.order.cycles else ""
        return f"{self.registers} registers{spills}{step}, {self.shared} bytes shared, {self.instructions or '-'}"


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

    In the Hopper kernel a block's exponents stand between the start of a PV and the wait for it, and nothing writes
    what a product under way reads. With P in bf16 a group passes its turn once, behind its last product.
    """
    found, config = [], row.config
    fp8 = row.products.startswith("fp8")
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
        found += _out_of_order(row.order, e4m3=fp8, lse="LSE" in row.detail)
    reduces, stores = row.opcodes["UTMAREDG"], row.opcodes["STG"]
    reducing = config.reduce and not row.detail.endswith("pointers")
    if bool(reduces) != reducing:
        found.append(f"{reduces} additions by the memory, {'some' if reducing else 'none'} wanted")
    if reducing and (stores or "out" in row.pointers):
        found.append(f"{stores} STG and pointers {', '.join(row.pointers)} beside additions by the memory")
    if row.stem in KEEP_NAN and (row.nan_lost or (CLAMPS.search(row.detail) and not row.nan_kept)):
        found.append(f"{row.nan_lost} minima and maxima that lose NaN, {row.nan_kept} that keep it")
    return [f"{row.name}, Triton {row.triton}: {problem}" for problem in found]


def _out_of_order(order: Order, *, e4m3: bool, lse: bool) -> list[str]:
    found = []
    beside, loops = sum(n >= EXPONENTS for n in order.exponents), TURNS
    if e4m3:  # which has them there in its loops over full blocks, unless an LSE needs the registers
        loops = 0 if lse else TURNS // 2
    if beside < loops:
        found.append(f"{beside} loops with {EXPONENTS} exponents beside PV, {loops} wanted")
    if not e4m3 and len(order.turns) != TURNS:
        found.append(f"{len(order.turns)} turns, {TURNS} wanted")
    for before, behind, passes in order.turns:
        if not before or behind or passes != 1:
            found.append(f"a turn of {before} products, passed {passes} times, with {behind} behind it")
    if order.cycles == float("inf"):
        found.append("played through, both groups come to wait for ever")
    if order.overwritten:
        found.append(f"{order.overwritten} instructions that write what a product under way reads")
    own = [barrier for barrier in order.barriers if barrier[0] >= RESERVED]
    if (len(own), *{threads for _, threads in own}) != ((0,) if e4m3 else (2, GROUP_THREADS)):
        found.append(f"named barriers {own}, not {'none' if e4m3 else 'two of both groups'}")
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
