"""Gates of a compiled kernel, and the rows that say what it does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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
class Row:
    """A compiled kernel.

    Attributes:
        stem: Stem of its launch table.
        kernel: Name of the jitted function.
        variant: Entry of the launch table.
        detail: What tells the case from the op's others.
        arch: Compute capability.
        config: Fields of the committed LaunchConfig.
        tile: Sizes of its blocks, as launched.
        num_warps: Warps of a program, as launched.
        num_stages: Depth of the pipeline, as launched.
        fp_fusion: Whether a * b + c may become one rounding.
        products: Format of its products: a key of :data:`PRODUCTS`.
        registers: Per thread.
        stack: Bytes per thread.
        spill_stores: STL instructions.
        spill_loads: LDL instructions.
        shuffles: SHFL instructions.
        shared: Bytes of shared memory per program.
        tensor_core: Number of each tensor-core instruction.
        triton: Version that compiled it.
        seconds: What compiling took.
        exponents: In the Hopper kernel, how many of a loop's stand beside products that are under way.
        turns: In the Hopper kernel, each loop's `disassembly.Turn`.
        barriers: In the Hopper kernel, numbers of named barriers, and the threads that meet there, 0 for all.
        step: In the Hopper kernel, instructions of the shortest loop over blocks.
        overwritten: In the Hopper kernel, instructions that write what a product under way reads.
        reduces: UTMAREDG instructions: additions by the memory.
        stores: STG instructions.
        pointers: Arguments that are pointers, by name.
        nan_kept: Minima and maxima of floating numbers in its PTX that give NaN where an operand is.
        nan_lost: Those that give the other operand.
    """

    stem: str
    kernel: str
    variant: str
    detail: str
    arch: int
    config: dict[str, Any]
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    fp_fusion: bool
    products: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shuffles: int
    shared: int
    tensor_core: dict[str, int]
    triton: str
    seconds: float
    exponents: list[int] = field(default_factory=list)
    turns: list[list[int]] = field(default_factory=list)
    barriers: list[list[int]] = field(default_factory=list)
    step: int = 0
    overwritten: int = 0
    reduces: int = 0
    stores: int = 0
    pointers: list[str] = field(default_factory=list)
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

    @property
    def instructions(self) -> str:
        """Its tensor-core instructions and how many of each."""
        return ", ".join(f"{name} {count}" for name, count in self.tensor_core.items()) or "-"

    @property
    def summary(self) -> str:
        """Its numbers in a line."""
        spills = f", {self.spill_stores} STL" if self.spill_stores else ""
        step = f", {self.step} instructions a step" if self.step else ""
        return f"{self.registers} registers{spills}{step}, {self.shared} bytes shared, {self.instructions}"


def problems(row: Row) -> list[str]:
    """Gates that a row fails, each in a line; empty where it holds all.

    No stack and no spills, but for :data:`MAY_SPILL`; it fits the device; its configuration is legal and is the one it
    was launched with; its listing has the tensor-core instructions of its format and no others; where its configuration
    says so, the memory adds, and there is no other way to the result; activations and casts keep NaN. (Triton may take
    others without a word: e4m3 as bf16 with max_num_imprecise_acc=0, sm_80's instructions on sm_100 with 16 warps.)

    In the Hopper kernel a block's exponents stand between the start of a PV and the wait for it, and nothing writes
    what a product under way reads. With P in bf16 a group passes its turn once, behind its last product.
    """
    found = []
    config = LaunchConfig(**row.config)
    fp8 = row.products.startswith("fp8")
    if (why := illegal(config, row.arch, fp8=fp8, shared_bytes=row.shared)) is not None:
        found.append(why)
    if (row.num_warps, row.num_stages) != (config.num_warps, config.num_stages):
        found.append(f"launched with {row.num_warps} warps and {row.num_stages} stages, not as {row.variant!r} says")
    committed = {name: row.config.get(name, 0) for name in row.tile}
    if row.tile != committed:
        found.append(f"launched with tiles {row.tile}, not {committed} as {row.variant!r} says")
    if row.fp_fusion != FP_FUSION:
        found.append("launched without enable_fp_fusion=FP_FUSION")
    if row.registers > MOST_REGISTERS:
        found.append(f"{row.registers} registers, at most {MOST_REGISTERS} allowed")
    if sorted(row.tensor_core) != row.wanted:
        used = ", ".join(sorted(row.tensor_core)) or "none"
        found.append(f"tensor-core instructions {used}, not {', '.join(row.wanted) or 'none'}")
    taking_turns = config.hopper and row.products != "fp8"
    beside, loops = sum(n >= EXPONENTS for n in row.exponents), TURNS
    if not taking_turns:  # e4m3 has them there in its loops over full blocks, unless an LSE needs the registers
        loops = TURNS // 2 if "LSE" not in row.detail else 0
    if config.hopper and beside < loops:
        found.append(f"{beside} loops with {EXPONENTS} exponents beside PV, {loops} wanted")
    if taking_turns and len(row.turns) != TURNS:
        found.append(f"{len(row.turns)} turns, {TURNS} wanted")
    for before, behind, passes in row.turns:
        if not before or behind or passes != 1:
            found.append(f"a turn of {before} products, passed {passes} times, with {behind} behind it")
    if row.overwritten:
        found.append(f"{row.overwritten} instructions that write what a product under way reads")
    own = [barrier for barrier in row.barriers if barrier[0] >= RESERVED]
    if config.hopper and (len(own), *{threads for _, threads in own}) != ((2, GROUP_THREADS) if taking_turns else (0,)):
        found.append(f"named barriers {own}, not {'two of both groups' if taking_turns else 'none'}")
    reducing = config.reduce and not row.detail.endswith("pointers")
    if bool(row.reduces) != reducing:
        found.append(f"{row.reduces} additions by the memory, {'some' if reducing else 'none'} wanted")
    if reducing and (row.stores or "out" in row.pointers):
        found.append(f"{row.stores} STG and pointers {', '.join(row.pointers)} beside additions by the memory")
    if row.stem in KEEP_NAN and (row.nan_lost or (CLAMPS.search(row.detail) and not row.nan_kept)):
        found.append(f"{row.nan_lost} minima and maxima that lose NaN, {row.nan_kept} that keep it")
    if (row.stem, row.arch) not in MAY_SPILL:
        if row.stack:
            found.append(f"{row.stack} bytes of stack")
        if row.spill_stores or row.spill_loads:
            found.append(f"spills: {row.spill_stores} STL, {row.spill_loads} LDL")
    return [f"{row.name}, Triton {row.triton}: {problem}" for problem in found]


def not_compiled(rows: Iterable[Row]) -> list[str]:
    """Entries of the launch tables that no row was launched with."""
    rows = list(rows)
    reached = {(row.stem, row.variant, row.arch) for row in rows}
    stems = sorted({row.stem for row in rows})
    listed = {(stem, variant, int(arch)) for stem in stems for variant, of in table(stem).items() for arch in of}
    return [
        f"{stem} {variant!r} for sm_{arch}: no case launches it" for stem, variant, arch in sorted(listed - reached)
    ]
