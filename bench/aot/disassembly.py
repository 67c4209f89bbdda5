"""Read a cubin's kernels with the tools in Triton's wheel; no GPU and no toolkit are needed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
# N of a product of m64nNkK, the first register of its sums, and that of its left operand where that is in registers.
_PRODUCT = re.compile(r"GMMA\.64x(\d+)x\d+\S* R(\d+), (?:R(\d+), )?")
_RESULT = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*) (?:P\d, )?R(\d+)\b")
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True, kw_only=True)
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

    A listing has an instruction a line, its encoding of 128 bits behind it, and the labels of jumps.

    Raises:
        ValueError: The tools name no kernel, or not the same ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        used = _USAGE.findall(_tool("cuobjdump", "-res-usage", file))
        listing = re.sub(r"\n\s+(/\* 0x[0-9a-f]{16} \*/)(?=\n)", r" \1", _tool("nvdisasm", "-c", file, "-hex"))
        _, *parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)
    listings = dict(zip(parts[::2], parts[1::2], strict=True))
    names = {name for name, *_ in used}
    if not names or names != set(listings):
        raise ValueError(f"a cubin has kernels {sorted(names)} and listings of {sorted(listings)}")
    return [
        (
            Compiled(
                kernel=name,
                registers=int(registers),
                stack=int(stack),
                shared=int(shared),
                opcodes=Counter(OPCODE.findall(listings[name])),
            ),
            listings[name],
        )
        for name, registers, stack, shared in used
    ]


def _tool(name: str, option: str, cubin: Path, *more: str) -> str:
    """Output of one of the tools in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None, "Triton is not installed"
    path = Path(spec.origin).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, option, *more, cubin], capture_output=True, text=True, check=True).stdout


def exponents_beside_products(code: str) -> list[int]:
    """Count a listing's exponents that are computed while one batch of warp-group products is under way, at each place.

    Counted between a wait that leaves one batch and the next that leaves none.
    """
    found, count = [], None
    for line in code.splitlines():
        if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in line:
            count = 0
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line and count is not None:
            found.append(count)
            count = None
        elif "MUFU.EX2" in line and count is not None:
            count += 1
    return found


Turn = tuple[int, int, int]
"""A warp group's step, from the wait for its turn on: products before it passes it, products after, times it passes."""


def turns(over_blocks: Iterable[list[str]], numbers: tuple[int, int], threads: int) -> list[Turn]:
    """The turn of every loop that waits for one.

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
        if not waits:
            continue
        (at, own), counts, passes = waits[0], [0, 0], 0
        for line in loop[at + 1 :] + loop[:at]:  # the loop begins somewhere else
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
