"""Compile what the cases launch by one version of Triton, without a GPU, and measure each kernel."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton

from bench.aot import disassembly, playback
from bench.aot.cases import HEAD_DIM, cases
from bench.aot.gates import EXPONENTS, GROUP_THREADS, Order, Row
from bench.aot.recording import Driver, Launch, in_forks, record
from happyhorse_fast.kernels.hopper_barriers import TURNS
from happyhorse_fast.kernels.launch import config_for

# Triton 3.8 clamps in bf16 what came of it.
NAN_KEPT = re.compile(r"\b(?:min|max)\.(?:ftz\.)?NaN\.(?:f32|bf16)")
NAN_LOST = re.compile(r"\b(?:min|max)\.(?:ftz\.)?(?:f32|bf16)")
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


def measure(launch: Launch) -> Row:
    """Compile a recorded kernel and read its resources and instructions."""
    case = launch.source
    Driver(case.arch).activate()
    built = launch.kernel.preload(launch.specialised)
    ((compiled, code),) = disassembly.read(built.asm["cubin"])
    hopper = "hopper" in launch.name
    data = json.loads(launch.specialised)
    options, names = data["options"], [launch.kernel.arg_names[path[0]] for path in data["constant_keys"]]
    constants = dict(zip(names, data["constant_vals"], strict=True))
    # A flag launches both forms, which may read in different ways.
    form = "" if constants.get("BOUNDED", True) else " running"
    variant = case.variants.get(f"{launch.name}{form}") or case.variants[launch.name]
    return Row(
        **vars(compiled) | {"shared": int(built.metadata.shared)},
        stem=case.stem,
        variant=variant,
        detail=f"{case.detail}{', bounded' if constants.get('BOUNDED') else ''}",
        arch=case.arch,
        # An entry may ask for the Hopper kernel: then another entry is launched, and a case of its own tells it so.
        config=replace(config_for(case.stem, variant, case.arch), hopper=hopper),
        tile={name.lower(): constants[name] for name in TILE if name in constants},
        num_warps=options["num_warps"],
        num_stages=constants.get("STAGES", options["num_stages"]),
        fp_fusion=options["enable_fp_fusion"],
        products=case.products,
        triton=triton.__version__,
        step=min(map(len, disassembly.loops(code, "MUFU.EX2"))) if case.stem == "attention" else 0,
        order=order_of(code, case.products, constants) if hopper else None,
        pointers=tuple(sorted(name for name, kind in data["signature"].items() if str(kind).startswith("*"))),
        nan_kept=len(NAN_KEPT.findall(built.asm["ptx"])),
        nan_lost=len(NAN_LOST.findall(built.asm["ptx"])),
    )


def order_of(code: str, products: str, constants: dict[str, Any]) -> Order:
    """In which order the instructions of the Hopper kernel's listing stand, and the cycles of a step."""
    loops = disassembly.loops(code)
    over_blocks = [loop for loop in loops if sum("MUFU.EX2" in line for line in loop) >= EXPONENTS]
    cycles, tile = None, constants["BLOCK"] * constants["D"]
    if constants["D"] == HEAD_DIM:  # no timed model has smaller heads
        full = over_blocks[::2]  # between them are those over partial blocks
        bodies = [[playback.Instruction.parsed(line) for line in loop] for loop in full]
        tile_bytes = {"k": tile * (2 if products == "bf16" else 1), "v": tile * (1 if products == "fp8" else 2)}
        cycles = playback.Player(bodies, constants["STAGES"], tile_bytes).cycles()
    return Order(
        exponents=disassembly.exponents_beside_products(code),
        turns=disassembly.turns(over_blocks, (TURNS.value, TURNS.value + 1), GROUP_THREADS),
        barriers=disassembly.named_barriers(code),
        overwritten=disassembly.overwritten(loops),
        cycles=cycles,
    )


def main() -> None:
    """Compile in forks, and pickle (rows, what failed)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("into", type=Path, help="file of the rows")
    parser.add_argument("--only", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    options = parser.parse_args()
    wanted = re.compile(options.only)
    chosen = (case for case in cases() if wanted.search(str(case)))
    launches = record((replace(case, arguments={}), case.arch, case.launch) for case in chosen)
    print(f"Triton {triton.__version__}: {len(launches)} kernels", flush=True)
    options.into.write_bytes(pickle.dumps(in_forks(measure, launches, options.jobs)))


if __name__ == "__main__":
    main()
