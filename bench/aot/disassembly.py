"""Read a cubin's kernels with the tools in Triton's wheel; no GPU and no toolkit are needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
# N of a product of m64nNkK, the first register of its sums, and that of its left operand where that is in registers.
_PRODUCT = re.compile(r"GMMA\.64x(\d+)x\d+\S* R(\d+), (?:R(\d+), )?")
_RESULT = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*) (?:P\d, )?R(\d+)\b")
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes, and what it is made of.

    Attributes:
        kernel: Its name.
        registers: Per thread.
        stack: Bytes per thread.
        shared: Bytes of shared memory per program.
        opcodes: Its instructions, and how many of each.
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]

    @property
    def tensor_core(self) -> dict[str, int]:
        """Its tensor-core instructions and how many of each."""
        return {name: count for name, count in sorted(self.opcodes.items()) if name.endswith("MMA")}

    @property
    def instructions(self) -> str:
        """The same in words."""
        return ", ".join(f"{name} {count}" for name, count in self.tensor_core.items())


def read(cubin: bytes) -> list[tuple[Compiled, str]]:
    """Every kernel of a cubin, its shared memory without what a launch adds, and its listing.

    Raises:
        ValueError: The tools name no kernel, or not the same ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        used = _USAGE.findall(_tool("cuobjdump", "-res-usage", file))
        _, *parts = re.split(r"^\.text\.(\w+):$", _tool("nvdisasm", "-c", file), flags=re.MULTILINE)
    listings = dict(zip(parts[::2], parts[1::2], strict=True))
    names = {name for name, *_ in used}
    if not names or names != set(listings):
        raise ValueError(f"a cubin has kernels {sorted(names)} and listings of {sorted(listings)}")
    found = []
    for name, *numbers in used:
        registers, stack, shared = map(int, numbers)
        opcodes = Counter(OPCODE.findall(listings[name]))
        found.append((Compiled(name, registers, stack, shared, opcodes), listings[name]))
    return found


def _tool(name: str, option: str, cubin: Path) -> str:
    """Output of one of the tools in Triton's wheel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def exponents_beside_products(code: str) -> list[int]:
    """Count a listing's exponents that are computed while warp-group products are under way, at each place.

    Counted from the first product behind a wait that leaves none to the next such wait.
    """
    found, count = [], None
    for line in code.splitlines():
        if "GMMA" in line and count is None:
            count = 0
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line and count is not None:
            found.append(count)
            count = None
        elif "MUFU.EX2" in line and count is not None:
            count += 1
    return found


def behind_pv(loop: list[str]) -> int:
    """Most instructions of a loop between PV, whose left operand is in registers, and the QK that follows."""
    most, since = 0, None
    for line in [*loop, *loop]:  # a step may begin before the loop begins again
        product = _PRODUCT.search(line)
        if product is None:
            since = since + 1 if since is not None else None
        elif product[3]:
            since = 0
        else:
            most, since = max(most, since or 0), None
    return most


Turn = tuple[int, int, int]
"""What a warp group does from its wait for a turn to the next: products before it passes it, after, times it passes."""


def turns(over_blocks: Iterable[list[str]], numbers: tuple[int, int], threads: int) -> list[Turn]:
    """The turns of loops, one for each wait.

    Args:
        over_blocks: Loops, as :func:`loops` gives them.
        numbers: Of the barriers; to pass is to arrive at the other one.
        threads: That meet there.
    """
    sync = re.compile(r"BAR\.SYNC\S* 0x([0-9a-f]+), " + hex(threads) + r"\b")
    arrive = re.compile(r"BAR\.ARV 0x([0-9a-f]+), " + hex(threads) + r"\b")
    found: list[Turn] = []
    for loop in over_blocks:
        waits = [(at, int(m[1], 16)) for at, line in enumerate(loop) if (m := sync.search(line)) is not None]
        waits = [(at, number) for at, number in waits if number in numbers]
        for turn, (at, own) in enumerate(waits):
            end, counts, passes = waits[(turn + 1) % len(waits)][0], [0, 0], 0
            for line in loop[at + 1 : end] if end > at else loop[at + 1 :] + loop[:end]:
                if (passed := arrive.search(line)) is not None:
                    passes += int(passed[1], 16) in numbers and int(passed[1], 16) != own
                counts[passes > 0] += "GMMA" in line
            found.append((counts[0], counts[1], passes))
    return found


def loops(code: str, holding: str = "GMMA") -> list[list[str]]:
    """Instructions of every loop of a listing with warp-group products, or others, that holds no other such loop.

    A wait may be tried again from behind a loop, by a jump back into it, which makes no loop.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in code.splitlines():
        if (label := re.match(r"(\.L_\w+):", line)) is not None:
            labels[label[1]] = len(instructions)
        elif OPCODE.search(line) is not None:
            instructions.append(line)
            back = re.search(r"BRA\S* .*`\((\.L_\w+)\)", line)
            first = labels.get(back[1]) if back is not None else None
            if first is not None and any(holding in inside for inside in instructions[first:]):
                spans.append((first, len(instructions)))
    own = [(a, b) for a, b in spans if not any(c < a < d < b for c, d in spans)]
    inner = [(a, b) for a, b in own if not any((a, b) != (c, d) and a <= c and d <= b for c, d in own)]
    return [instructions[a:b] for a, b in inner]


def products_and_waits(loop: Iterable[str]) -> tuple[int, list[int]]:
    """(products of a loop, how many batches of them each wait leaves under way)."""
    lines = list(loop)
    waits = [re.search(r"DEPBAR\.LE gsb0, 0x([0-9a-f]+)", line) for line in lines]
    return sum("GMMA" in line for line in lines), [int(wait[1], 16) for wait in waits if wait is not None]


def widths(code: str, opcode: str) -> list[int]:
    """Bytes that each LDG or STG of a listing moves, a thread."""
    named = {"U8": 1, "U16": 2, "64": 8, "128": 16}
    found = re.findall(rf"\b{opcode}\.E(?:\.(U8|U16|64|128))?\b", code)
    return [named.get(width, 4) for width in found]


def overwritten(found_loops: Iterable[list[str]]) -> int:
    """Count the instructions of loops that write a register which a warp-group product under way reads or adds to.

    A loop is walked twice, so that what is under way when it begins again counts. A product's left operand stays in
    registers until the wait for it; ptxas (CUDA 12.8) does not see to that where the wait comes in the next iteration.
    """
    found = set()
    for number, loop in enumerate(found_loops):
        batches: list[set[int]] = []
        held: set[int] = set()  # of the batch that is being issued
        for at, line in [*enumerate(loop), *enumerate(loop)]:
            if (product := _PRODUCT.search(line)) is not None:
                sums, left = int(product[2]), product[3]
                held |= {*range(sums, sums + int(product[1]) // 2)} | (
                    {*range(int(left), int(left) + 4)} if left else set()
                )
                if "gsb0" in line:
                    batches, held = [*batches, held], set()
            elif (wait := re.search(r"DEPBAR\.LE gsb0, 0x([0-9a-f]+)", line)) is not None:
                batches = batches[max(len(batches) - int(wait[1], 16), 0) :]
            elif (result := _RESULT.search(line)) is not None:
                wide = 4 if ".128" in result[1] else 2 if ".64" in result[1] or ".WIDE" in result[1] else 1
                written = {*range(int(result[2]), int(result[2]) + wide)}
                if any(written & registers for registers in (*batches, held)):
                    found.add((number, at))
    return len(found)


def named_barriers(code: str) -> list[tuple[int, int]]:
    """Numbers of named barriers that a listing's instructions hold, and of threads; 0 threads: all of the block."""
    found = re.findall(r"BAR\.(?:SYNC\S*|ARV) 0x([0-9a-f]+)(?:, 0x([0-9a-f]+))?", code)
    return sorted({(int(number, 16), int(threads or "0", 16)) for number, threads in found})
