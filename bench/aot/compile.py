"""Compile what the launchers launch, without a GPU, and measure it: one process, one version of Triton, one shard.

Triton's own JIT specialises the recorded arguments (alignment, ones, Nones, descriptors): a stand-in driver names the
architecture, and Triton's cache hook takes the specialisation out just before it would be compiled and launched. So
what is compiled is what is launched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction

from bench.aot import disassembly
from bench.aot.cases import Case, cases
from bench.aot.gates import EXPONENTS, GROUP_THREADS, Row
from happyhorse_fast.kernels.hopper_barriers import TURNS
from happyhorse_fast.kernels.launch import config_for
from happyhorse_fast.kernels.numerics import to_e4m3

# Triton 3.8 clamps in bf16 what came of it.
NAN_KEPT = re.compile(r"\b(?:min|max)\.(?:ftz\.)?NaN\.(?:f32|bf16)")
NAN_LOST = re.compile(r"\b(?:min|max)\.(?:ftz\.)?(?:f32|bf16)")
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


class Driver:
    """Answers what Triton's JIT asks of a driver before it launches: a device, which here is an architecture."""

    def __init__(self) -> None:
        self.arch = 0

    def get_current_device(self) -> int:
        """A device per architecture: the JIT caches per device."""
        return self.arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton's JIT specialised it.

    Attributes:
        case: The first case that launched it.
        kernel: The jitted function.
        specialised: Signature, constants, attributes and options, as Triton writes them for `preload`.
    """

    case: Case
    kernel: Any
    specialised: str

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def constants(self) -> dict[str, Any]:
        """Constants by the names of their arguments."""
        data = json.loads(self.specialised)
        names = [self.kernel.arg_names[path[0]] for path in data["constant_keys"]]
        return dict(zip(names, data["constant_vals"], strict=True))

    def pointers(self) -> list[str]:
        """Names of the arguments that are pointers."""
        signature = json.loads(self.specialised)["signature"]
        return sorted(name for name, kind in signature.items() if str(kind).startswith("*"))

    def options(self) -> dict[str, Any]:
        return dict(json.loads(self.specialised)["options"])


@contextlib.contextmanager
def recording(launched: Callable[[Any, str], None]) -> Iterator[None]:
    """Hand kernels that are launched inside over as (jitted function, specialisation); none is compiled."""

    def hook(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        launched(fn.jit_function, compile["specialization_data"])
        return True  # do not compile, do not launch

    with triton.knobs.runtime.scope(), triton.knobs.language.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        # The other default, so that a launch that does not say which it wants shows.
        triton.knobs.language.default_fp_fusion = False
        yield


def record(driver: Driver, given: Iterator[Case]) -> list[Launch]:
    """The distinct kernels that the cases launch, in their order."""
    found: dict[tuple[int, str], Launch] = {}

    def launched(kernel: Any, specialised: str) -> None:
        found.setdefault((case.arch, specialised), Launch(case, kernel, specialised))

    with recording(launched):
        for case in given:
            driver.arch = case.arch
            case.launch()
    return list(found.values())


def measure(driver: Driver, launch: Launch) -> Row:
    """Compile a recorded kernel and read its resources and instructions."""
    started = time.perf_counter()
    driver.arch = launch.case.arch
    built = launch.kernel.preload(launch.specialised)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        ((registers, stack, _),) = disassembly.usage(cubin).values()
        (opcodes,) = disassembly.opcodes(cubin).values()
        order = hopper_order(cubin) if launch.case.hopper else {}
    case, constants, options = launch.case, launch.constants(), launch.options()
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
        pointers=launch.pointers(),
        nan_kept=len(NAN_KEPT.findall(built.asm["ptx"])),
        nan_lost=len(NAN_LOST.findall(built.asm["ptx"])),
        triton=triton.__version__,
        seconds=round(time.perf_counter() - started, 1),
        **order,
    )


def hopper_order(cubin: Path) -> dict[str, Any]:
    """Fields of a Row that say in which order the Hopper kernel's instructions stand."""
    return {
        "exponents": disassembly.exponents_beside_products(cubin),
        "turns": [
            list(turn) for turn in disassembly.turns(cubin, (TURNS.value, TURNS.value + 1), GROUP_THREADS, EXPONENTS)
        ],
        "barriers": [list(barrier) for barrier in disassembly.named_barriers(cubin)],
        "overwritten": disassembly.overwritten(cubin),
        "step": min(map(len, disassembly.loops(cubin, EXPONENTS)), default=0),
    }


def main() -> None:
    """Print the number of kernels of the shard, then one row per line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", default="0/1", help="which of how many")
    parser.add_argument("--only", default="", help="regular expression that a case's name must contain")
    options = parser.parse_args()
    if isinstance(to_e4m3, InterpretedFunction):
        sys.exit("TRITON_INTERPRET must not be set: nothing would be compiled")
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    shard, shards = map(int, options.shard.split("/"))
    wanted = re.compile(options.only)
    launches = record(driver, (c for c in cases() if wanted.search(f"sm_{c.arch} {c.op} {c.detail}")))
    launches = launches[shard::shards]
    print(json.dumps({"kernels": len(launches), "triton": triton.__version__}), flush=True)
    for launch in launches:
        try:
            result = asdict(measure(driver, launch))
        except Exception as error:
            # The compiler's own errors are of many kinds; one kernel's must not hide the others' rows.
            about = f"sm_{launch.case.arch} {launch.name} {launch.case.detail}, Triton {triton.__version__}"
            result = {"failure": f"{about} does not compile: {type(error).__name__}: {str(error)[-500:]}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
