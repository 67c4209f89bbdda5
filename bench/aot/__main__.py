"""Compile every launch of the committed tables without a GPU, hold the gates, and write or check docs/AOT.md.

python -m bench.aot --also .aot/triton-3.6.0 --also .aot/triton-3.8.0 --write    what `make aot` runs
python -m bench.aot --also .aot/triton-3.6.0 --also .aot/triton-3.8.0 --check    what `make aot-check` runs
python -m bench.aot --only "sm_90 fp8_linear fp8"                                some cases, printed alone
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.aot.gates import Row, not_compiled, problems
from bench.bootstrap import ROOT
from bench.processes import CommandFailed, compiling, json_lines

DOCUMENT = ROOT / "docs" / "AOT.md"
SHARDS = 3
"""Per version: a new process every few minutes, because the compiler's memory grows."""
HEADER = ("kernel", "sm", "tile", "warps, stages", "registers", "stack", "STL / LDL", "shared", "tensor core", "SHFL")
INTRODUCTION = """# Ahead-of-time compiles

Written by `make aot`; `make aot-check`, part of `make check`, compiles again and fails where a gate fails or this page
differs. Every launch that the tables in `kernels/configs/` allow at the 15B model's shapes, as Triton's JIT specialises
it, compiled without a GPU by Triton {versions}. A cell with several values has them in this order.

Every kernel fits its device, and products use the tensor-core instruction of their format and no other. None has stack
or spills but for those of `MAY_SPILL` in `bench/aot/gates.py`; on sm_90 none at all. "Pointers" is a launch for tensors
that no TMA descriptor can be made of. "Hopper" is the Gluon kernel for sm_90 alone: its registers are those of its
launch, of which computing groups then take 240 a thread and the loading warp 24; in bf16 and with int8 q and k each of
its loops has the exponents of a block beside the PV of the one before, and passes its turn once, behind its last
product. Stack and shared memory are in bytes; SHFL, STL and LDL count instructions in the listing, not executions. None
of this says how fast a kernel is. Instructions of attention's steps, with a maximum and bounded, and predictions per
architecture: [kernels/attention.md](kernels/attention.md).
"""


@dataclass(frozen=True)
class Shard:
    """A part of the cases for one version of Triton: the folder that holds it, or None for the installed one."""

    folder: Path | None
    number: int


class Compiles:
    """The compiles of one run, and what came of them."""

    def __init__(self, console: Console, only: str) -> None:
        self.console, self.only = console, only
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.expected = 0

    def run(self, shard: Shard) -> None:
        """Compile a shard in a process of its own; a line per kernel."""
        options = ("--shard", f"{shard.number}/{SHARDS}", "--only", self.only)
        try:
            for data in json_lines([sys.executable, "-m", "bench.aot.compile", *options], compiling(shard.folder)):
                if "kernels" in data:
                    self.expected += data["kernels"]
                elif "failure" in data:
                    self.failures.append(data["failure"])
                    self.console.print(data["failure"], style="red", highlight=False)
                else:
                    self.rows.append(row := Row(**data))
                    said = f"{len(self.rows)}/{self.expected} {row.triton} {row.name}: {row.summary} ({row.seconds} s)"
                    self.console.print(said, highlight=False)
        except CommandFailed as error:
            self.failures.append(f"compiling {shard}: {error}")


def key_of(version: str) -> tuple[int, ...]:
    """Return a version's numbers, to sort by."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3])


def cells(rows: list[Row | None]) -> list[str]:
    """A line of the table from one kernel's rows, a row per version."""
    known = [row for row in rows if row is not None]
    columns = [
        [str(row.registers) if row else "-" for row in rows],
        [str(row.stack) if row else "-" for row in rows],
        [f"{row.spill_stores} / {row.spill_loads}" if row else "-" for row in rows],
        [f"{row.shared:,}" if row else "-" for row in rows],
        [row.instructions if row else "-" for row in rows],
        [str(row.shuffles) if row else "-" for row in rows],
    ]
    first = known[0]
    return [
        f"{first.kernel.removesuffix('_kernel')} {first.detail}",
        str(first.arch),
        " x ".join(map(str, first.tile.values())) or "-",
        f"{first.num_warps}, {first.num_stages}",
        *(values[0] if len(set(values)) == 1 else "; ".join(values) for values in columns),
    ]


def lines_of(rows: Iterable[Row], versions: list[str]) -> list[list[str]]:
    """A line per kernel, by stem, architecture and name."""
    found: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda r: (r.stem, r.arch, r.kernel, r.detail)):
        found.setdefault(row.name, {})[row.triton] = row
    return [cells([by.get(version) for version in versions]) for by in found.values()]


def document(rows: list[Row], versions: list[str]) -> str:
    """The text of docs/AOT.md."""
    parts = [INTRODUCTION.format(versions=", ".join(versions))]
    for stem in sorted({row.stem for row in rows}):
        parts += ["", f"## `{stem}`", "", f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
        parts += [f"| {' | '.join(line)} |" for line in lines_of((r for r in rows if r.stem == stem), versions)]
    return "\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def show(console: Console, rows: list[Row], versions: list[str]) -> None:
    """Print the table."""
    drawn = Table(*HEADER, title=f"Triton {' and '.join(versions)}", title_justify="left")
    for line in lines_of(rows, versions):
        drawn.add_row(*line)
    console.print(drawn)


def differences(text: str) -> list[str]:
    """List how docs/AOT.md differs from what was measured."""
    there = DOCUMENT.read_text().splitlines() if DOCUMENT.exists() else []
    changed = list(difflib.unified_diff(there, text.splitlines(), "docs/AOT.md", "measured", lineterm="", n=0))
    return [*changed, "docs/AOT.md is not what was measured; `make aot` writes it"] if changed else []


def main() -> int:
    """Exit status: 0 where every gate holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", type=Path, action="append", default=[], help="folder with another version of Triton")
    parser.add_argument("--only", default="", help='regular expression over "sm_90 fp8_linear fp8, plain, bf16 out"')
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile side by side")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write docs/AOT.md")
    what.add_argument("--check", action="store_true", help="fail where docs/AOT.md differs")
    options = parser.parse_args()
    if options.only and (options.write or options.check):
        parser.error("--write and --check are about all cases, so not with --only")
    width = None if sys.stdout.isatty() else 200
    console, started = Console(width=width, markup=False, emoji=False), time.perf_counter()
    compiles = Compiles(console, options.only)
    folders = [None, *(folder.resolve() for folder in options.also)]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(compiles.run, [Shard(folder, n) for folder in folders for n in range(SHARDS)]))
    rows = compiles.rows
    versions = sorted({row.triton for row in rows}, key=key_of, reverse=True)
    found = [*compiles.failures, *(problem for row in rows for problem in problems(row))]
    if len(versions) != len(folders):
        found.append(f"{len(folders)} versions of Triton were to compile, got {', '.join(versions) or 'none'}")
    if not options.only:
        for version in versions:
            found += [f"{entry} (Triton {version})" for entry in not_compiled(r for r in rows if r.triton == version)]
    if rows:
        show(console, rows, versions)
    if options.write and not found:
        DOCUMENT.write_text(document(rows, versions))
    if options.check:
        found += differences(document(rows, versions))
    for problem in found:
        console.print(problem, style="red", highlight=False)
    minutes = (time.perf_counter() - started) / 60
    console.print(f"{len(rows)} compiles, {len(found)} problems, {minutes:.1f} minutes", highlight=False)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
