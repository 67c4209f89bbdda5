"""Compile what the cases launch by one version of Triton, without a GPU, and measure each kernel."""

from __future__ import annotations

import json
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import triton

from bench.aot import disassembly
from bench.aot.cases import cases
from bench.aot.gates import EXPONENTS, GROUP_THREADS, Beside, Order, Row
from bench.aot.recording import Driver, Launch, in_forks, record
from happyhorse_fast.kernels.hopper_barriers import TURNS
from happyhorse_fast.kernels.launch import config_for, hopper_of

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
    attention, product = "hopper" in launch.name, "beside" in launch.name
    data = json.loads(launch.specialised)
    options, names = data["options"], [launch.kernel.arg_names[path[0]] for path in data["constant_keys"]]
    constants = dict(zip(names, data["constant_vals"], strict=True))
    # A flag launches both forms, which may read in different ways.
    form = "" if constants.get("BOUNDED", True) else " running"
    variant = case.variants.get(f"{launch.name}{form}") or case.variants[launch.name]
    # An entry may ask for the Hopper kernel: then another one is launched, and a case of its own tells it so.
    config = replace(config_for(case.stem, variant, case.arch), hopper=attention or product)
    return Row(
        **vars(compiled) | {"shared": int(built.metadata.shared)},
        stem=case.stem,
        variant=variant,
        detail=f"{case.detail}{', bounded' if constants.get('BOUNDED') else ''}",
        arch=case.arch,
        config=hopper_of(config) if product else config,
        tile={name.lower(): constants[name] for name in TILE if name in constants},
        num_warps=options["num_warps"],
        num_stages=constants.get("STAGES", options["num_stages"]),
        fp_fusion=options["enable_fp_fusion"],
        products=case.products,
        triton=triton.__version__,
        step=step_of(code, attention) if case.stem == "attention" else 0,
        order=order_of(code) if attention else None,
        beside=beside_in(code) if product else None,
        pointers=tuple(sorted(name for name, kind in data["signature"].items() if str(kind).startswith("*"))),
        nan_kept=len(NAN_KEPT.findall(built.asm["ptx"])),
        nan_lost=len(NAN_LOST.findall(built.asm["ptx"])),
    )


def step_of(code: str, hopper: bool) -> int:
    """Instructions of attention's step over a full block; the Hopper kernel's loop may have several steps."""
    loops = disassembly.loops(code, "MUFU.EX2")
    steps = [sum("MUFU.EX2" in line for line in loop) // EXPONENTS if hopper else 1 for loop in loops]
    return min(len(loop) // max(count, 1) for loop, count in zip(loops, steps, strict=True))


def order_of(code: str) -> Order:
    """In which order the instructions of attention's listing stand."""
    loops = disassembly.loops(code)
    over_blocks = [loop for loop in loops if sum("MUFU.EX2" in line for line in loop) >= EXPONENTS]
    return Order(
        exponents=disassembly.exponents_beside_products(code),
        turns=disassembly.turns(over_blocks, (TURNS.value, TURNS.value + 1), GROUP_THREADS),
        barriers=disassembly.named_barriers(code),
        behind_pv=max([n for n in map(disassembly.behind_pv, over_blocks[::2]) if n], default=0),
        overwritten=disassembly.overwritten(loops),
    )


def beside_in(code: str) -> Beside:
    """What the listing of a product with its epilogue beside the tensor cores must be held against."""
    loops = disassembly.loops(code)
    return Beside(
        loops=[disassembly.products_and_waits(loop) for loop in loops],
        loads=disassembly.widths(code, "LDG"),
        stores=disassembly.widths(code, "STG"),
        overwritten=disassembly.overwritten(loops),
    )


def main() -> None:
    """Compile in forks and pickle (rows, what failed): into which file, of which cases, in how many processes."""
    into, only, jobs = sys.argv[1:]
    chosen = (case for case in cases() if re.search(only, str(case)))
    launches = record((replace(case, arguments={}), case.arch, case.launch) for case in chosen)
    print(f"Triton {triton.__version__}: {len(launches)} kernels", flush=True)
    Path(into).write_bytes(pickle.dumps(in_forks(measure, launches, int(jobs))))


if __name__ == "__main__":
    main()
