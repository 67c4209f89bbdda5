"""Compile every launch of the committed tables without a GPU, hold the gates, and write or check docs/AOT.md.

python -m bench.aot --also .aot/triton-3.6.0 --also .aot/triton-3.8.0 --write    what `make aot` runs
python -m bench.aot --also .aot/triton-3.6.0 --also .aot/triton-3.8.0 --check    what `make aot-check` runs
python -m bench.aot --only "sm_90 fp8_linear fp8"                                some cases, printed alone
"""

from __future__ import annotations

import argparse
import difflib
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from bench.aot.gates import Row, not_compiled, problems
from bench.bootstrap import ROOT
from bench.table import Table

DOCUMENT = ROOT / "docs" / "AOT.md"
HEADER = (
    "kernel",
    "sm",
    "tile",
    "warps, stages",
    "registers",
    "stack",
    "STL / LDL",
    "shared",
    "tensor core",
    "SHFL",
    "a step",
)
INTRODUCTION = """# Ahead-of-time compiles

Written by `make aot`; `make aot-check`, part of `make check`, compiles again and fails where a gate fails or this page
differs. Every launch that the tables in `kernels/configs/` allow at the 15B model's shapes, as Triton's JIT specialises
it, compiled without a GPU by Triton {versions}. A cell with several values has them in this order.

Every kernel fits its device, and products use the tensor-core instruction of their format and no other. None has stack
or spills but for those of `MAY_SPILL` in `bench/aot/gates.py`; on sm_90 none at all. "Pointers" is a launch for tensors
that no TMA descriptor can be made of. "Hopper" are the Gluon kernels for sm_90 alone, their registers those of the
launch. In attention's, computing groups then take 240 a thread and the loading warp 24; every step has the exponents of
a block beside products of its group, in bf16 and with int8 q and k PV of the block before, in e4m3 QK of the next one,
and passes its turn once, behind its last product. In those of products, multiplying groups take 184 and the other warps
136, with QKV and residuals all 168, and each loop over slots waits for the slot before, never for its own. Stack and
shared memory are in bytes; SHFL, STL and LDL count instructions in the listing, not executions; "a step" those of a
thread in attention's loop over full blocks, with a running maximum or bounded. None of this says how fast a kernel is;
predictions per architecture: [kernels/attention.md](kernels/attention.md).
"""


def compiled(triton: Path | None, only: str, jobs: int) -> tuple[list[Row], list[str]]:
    """(rows, failures) of the cases, in a process of their own.

    Args:
        triton: Folder that holds the version that compiles, or None for the installed one.
        only: Regular expression over their names.
        jobs: Processes that compile side by side.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env |= {"PYTHONPATH": str(triton.resolve())} if triton else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        command = [sys.executable, "-m", "bench.aot.compile", str(file), only, str(jobs)]
        code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
        if code:
            return [], [f"compiling by Triton of {triton or 'this environment'} ended with {code}"]
        rows, failures = pickle.loads(file.read_bytes())
        return rows, failures


def numbers(row: Row) -> list[str]:
    """What may differ between versions."""
    spills, counts = f"{row.opcodes['STL']} / {row.opcodes['LDL']}", [str(row.opcodes["SHFL"]), str(row.step or "-")]
    return [str(row.registers), str(row.stack), spills, f"{row.shared:,}", row.instructions or "-", *counts]


def cells(rows: list[Row | None]) -> list[str]:
    """A line of the table from one kernel's rows, a row per version."""
    first = next(row for row in rows if row is not None)
    columns = zip(*(numbers(row) if row else ["-"] * len(numbers(first)) for row in rows), strict=True)
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
        lines = [HEADER, ["---"] * len(HEADER), *lines_of((row for row in rows if row.stem == stem), versions)]
        columns = len(HEADER) - (stem != "attention")  # which alone has steps
        parts += ["", f"## `{stem}`", "", *(f"| {' | '.join(line[:columns])} |" for line in lines)]
    return "\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


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
    started = time.perf_counter()
    folders = [None, *options.also]
    of_folders = [compiled(folder, options.only, options.jobs) for folder in folders]
    rows = [row for of_folder, _ in of_folders for row in of_folder]
    versions = sorted({row.triton for row in rows}, key=lambda v: [*map(int, re.findall(r"\d+", v)[:3])], reverse=True)
    found = [failure for _, failures in of_folders for failure in failures]
    found += [problem for row in rows for problem in problems(row)]
    if len(versions) != len(folders):
        found.append(f"{len(folders)} versions of Triton were to compile, got {', '.join(versions) or 'none'}")
    if not options.only:
        for version in versions:
            found += [f"{entry} (Triton {version})" for entry in not_compiled(r for r in rows if r.triton == version)]
    if rows:
        lines = tuple(map(tuple, lines_of(rows, versions)))
        print(Table(f"Triton {' and '.join(versions)}", HEADER, lines).text())
    if options.write and not found:
        DOCUMENT.write_text(document(rows, versions))
    if options.check:
        there = DOCUMENT.read_text().splitlines() if DOCUMENT.exists() else []
        wanted = document(rows, versions).splitlines()
        changed = list(difflib.unified_diff(there, wanted, "docs/AOT.md", "measured", lineterm="", n=0))
        found += [*changed, "docs/AOT.md is not what was measured; `make aot` writes it"] if changed else []
    for problem in found:
        print(problem)
    print(f"{len(rows)} compiles, {len(found)} problems, {(time.perf_counter() - started) / 60:.1f} minutes")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
