"""Read a cubin's kernels with the tools in Triton's wheel; no GPU and no toolkit are needed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def tool(name: str, option: str, cubin: Path) -> str:
    """Output of one of the tools in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None, "Triton is not installed"
    path = Path(spec.origin).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout


def usage(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of stack and bytes of static shared memory of every kernel."""
    found = _USAGE.findall(tool("cuobjdump", "-res-usage", cubin))
    return {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in found}


def exponents_beside_products(cubin: Path) -> list[int]:
    """Count the exponents that are computed while one batch of warp-group products is under way, at each such place.

    Counted between a wait that leaves one batch and the next that leaves none.
    """
    found, count = [], None
    for line in tool("nvdisasm", "-c", cubin).splitlines():
        if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in line:
            count = 0
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line and count is not None:
            found.append(count)
            count = None
        elif "MUFU.EX2" in line and count is not None:
            count += 1
    return found


class Turn(NamedTuple):
    """Products of a warp group between a wait for its turn and the end of its step: before it passes, and behind."""

    before: int
    behind: int
    passes: int


def turns(cubin: Path, numbers: tuple[int, int], threads: int) -> list[Turn]:
    """Every turn in the listing: from a wait at one of two named barriers on, to the wait for all products.

    Args:
        cubin: The binary.
        numbers: Of the barriers; to pass is to arrive at the other one.
        threads: That meet there.
    """
    sync = re.compile(r"BAR\.SYNC\S* 0x([0-9a-f]+), " + hex(threads) + r"\b")
    arrive = re.compile(r"BAR\.ARV 0x([0-9a-f]+), " + hex(threads) + r"\b")
    found: list[Turn] = []
    number: int | None = None
    counts = [0, 0]
    passes = 0
    for line in tool("nvdisasm", "-c", cubin).splitlines():
        code = OPCODE.search(line)
        if (at := sync.search(line)) and int(at[1], 16) in numbers:
            if number is not None:
                found.append(Turn(counts[0], counts[1], passes))
            number, counts, passes = int(at[1], 16), [0, 0], 0
        elif number is None or code is None:
            continue
        elif (at := arrive.search(line)) and int(at[1], 16) in numbers and int(at[1], 16) != number:
            passes += 1
        elif code[1].endswith("GMMA"):
            counts[passes > 0] += 1
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line:
            found.append(Turn(counts[0], counts[1], passes))
            number = None
    return found


def steps(cubin: Path, exponents: int) -> list[int]:
    """Instructions of every loop with warp-group products and at least so many exponents, and no such loop in it."""
    listing: list[str] = []
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for line in tool("nvdisasm", "-c", cubin).splitlines():
        if (label := re.match(r"(\.L_\w+):", line)) is not None:
            labels[label[1]] = len(listing)
        elif (code := OPCODE.search(line)) is not None:
            listing.append("MUFU.EX2" if "MUFU.EX2" in line else code[1])
            back = re.search(r"BRA `\((\.L_\w+)\)", line)
            if back is not None and (first := labels.get(back[1])) is not None:
                body = listing[first:]
                if body.count("MUFU.EX2") >= exponents and any(name.endswith("GMMA") for name in body):
                    found.append((first, len(listing)))
    inner = [(a, b) for a, b in found if not any((a, b) != (c, d) and a <= c and d <= b for c, d in found)]
    return [b - a for a, b in inner]


def named_barriers(cubin: Path) -> list[tuple[int, int]]:
    """Numbers of named barriers that instructions hold, and of threads; 0 threads: all of the block."""
    found = re.findall(r"BAR\.(?:SYNC\S*|ARV) 0x([0-9a-f]+)(?:, 0x([0-9a-f]+))?", tool("nvdisasm", "-c", cubin))
    return sorted({(int(number, 16), int(threads or "0", 16)) for number, threads in found})


def opcodes(cubin: Path) -> dict[str, Counter[str]]:
    """Count each instruction in the listing of every kernel."""
    _, *parts = re.split(r"^\.text\.(\w+):$", tool("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    return {name: Counter(OPCODE.findall(text)) for name, text in zip(parts[::2], parts[1::2], strict=True)}
