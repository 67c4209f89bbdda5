"""Compile what the cases launch by one version of Triton, without a GPU, and measure each kernel."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import triton

from bench.aot import disassembly
from bench.aot.cases import Case, cases
from bench.aot.gates import EXPONENTS, GROUP_THREADS, Row
from bench.aot.recording import Driver, Launch, in_forks, recording
from happyhorse_fast.kernels.hopper_barriers import TURNS
from happyhorse_fast.kernels.launch import config_for

# Triton 3.8 clamps in bf16 what came of it.
NAN_KEPT = re.compile(r"\b(?:min|max)\.(?:ftz\.)?NaN\.(?:f32|bf16)")
NAN_LOST = re.compile(r"\b(?:min|max)\.(?:ftz\.)?(?:f32|bf16)")
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


def record(given: Iterable[Case]) -> list[Launch]:
    """The distinct kernels that the cases launch, in their order."""
    found: dict[tuple[int, str], Launch] = {}

    def launched(module: str, name: str, specialised: str) -> None:
        source = replace(case, arguments={})
        found.setdefault((case.arch, specialised), Launch(module, name, specialised, source))

    with recording(launched):
        for case in given:
            Driver(case.arch).activate()
            case.launch()
    return list(found.values())


def measure(launch: Launch) -> Row:
    """Compile a recorded kernel and read its resources and instructions."""
    started, case = time.perf_counter(), launch.source
    Driver(case.arch).activate()
    built = launch.kernel.preload(launch.specialised)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        ((registers, stack, _),) = disassembly.usage(cubin).values()
        code = disassembly.listing(cubin)
    (opcodes,) = disassembly.opcodes(code).values()
    order = hopper_order(code) if case.hopper else {}
    data = json.loads(launch.specialised)
    options, names = data["options"], [launch.kernel.arg_names[path[0]] for path in data["constant_keys"]]
    constants = dict(zip(names, data["constant_vals"], strict=True))
    # A flag launches both forms, which may read in different ways.
    form = "" if constants.get("BOUNDED", True) else " running"
    variant = case.variants.get(f"{launch.name}{form}") or case.variants[launch.name]
    return Row(
        stem=case.stem,
        kernel=launch.name,
        variant=variant,
        detail=f"{case.detail}{', bounded' if constants.get('BOUNDED') else ''}",
        arch=case.arch,
        # An entry may ask for the Hopper kernel: then another entry is launched, and a case of its own tells it so.
        config=asdict(replace(config_for(case.stem, variant, case.arch), hopper=case.hopper)),
        tile={name.lower(): constants[name] for name in TILE if name in constants},
        num_warps=options["num_warps"],
        num_stages=constants.get("STAGES", options["num_stages"]),
        fp_fusion=options["enable_fp_fusion"],
        products=case.products,
        registers=registers,
        stack=stack,
        spill_stores=opcodes["STL"],
        spill_loads=opcodes["LDL"],
        shuffles=opcodes["SHFL"],
        shared=int(built.metadata.shared),
        tensor_core={name: opcodes[name] for name in sorted(opcodes) if name.endswith("MMA")},
        reduces=opcodes["UTMAREDG"],
        stores=opcodes["STG"],
        pointers=sorted(name for name, kind in data["signature"].items() if str(kind).startswith("*")),
        nan_kept=len(NAN_KEPT.findall(built.asm["ptx"])),
        nan_lost=len(NAN_LOST.findall(built.asm["ptx"])),
        triton=triton.__version__,
        seconds=round(time.perf_counter() - started, 1),
        **order,
    )


def hopper_order(code: str) -> dict[str, Any]:
    """Fields of a Row that say in which order the instructions stand in the Hopper kernel's listing."""
    loops = disassembly.loops(code)
    over_blocks = [loop for loop in loops if sum("MUFU.EX2" in line for line in loop) >= EXPONENTS]
    turns = disassembly.turns(over_blocks, (TURNS.value, TURNS.value + 1), GROUP_THREADS)
    return {
        "exponents": disassembly.exponents_beside_products(code),
        "turns": [list(turn) for turn in turns],
        "barriers": [list(barrier) for barrier in disassembly.named_barriers(code)],
        "overwritten": disassembly.overwritten(loops),
        "step": min(map(len, over_blocks), default=0),
    }


def main() -> None:
    """Compile in forks, say how each did, and write the rows and what failed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("into", type=Path, help="file of the rows")
    parser.add_argument("--only", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    options = parser.parse_args()
    wanted = re.compile(options.only)
    launches = record(c for c in cases() if wanted.search(f"sm_{c.arch} {c.op} {c.detail}"))
    rows, failures = [], []
    for place, (launch, done) in enumerate(in_forks(measure, launches, options.jobs), 1):
        if isinstance(done, str):
            about = f"sm_{launch.source.arch} {launch.name} {launch.source.detail}, Triton {triton.__version__}"
            failures.append(said := f"{about} does not compile: {done}")
        else:
            rows.append(asdict(done))
            said = f"{done.triton} {done.name}: {done.summary} ({done.seconds} s)"
        print(f"{place}/{len(launches)} {said}", flush=True)
    options.into.write_text(json.dumps({"rows": rows, "failures": failures}))


if __name__ == "__main__":
    main()
