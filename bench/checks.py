"""Checks before anything is timed: sources build, kernels pass their self-check.

Run as ``python -m bench.checks native`` or ``self``.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import LOST
from happyhorse_fast.ops.runtime import formats, self_check, trust
from happyhorse_fast.ops.runtime.cuda.launch import cuda_obstacle


def native(package: Path) -> int:
    """Build what an installation builds, without setuptools: the host module, and CUDA binaries where there is nvcc."""
    from happyhorse_fast.csrc import native

    if native.compiler() is None:
        print("no C++ compiler: the host module and CUDA binaries are not built")
        return 0
    module = native.build(package, bootstrap.ROOT)
    print(f"built {module.name} and {len(list((package / 'cubins').iterdir())) - 1} CUDA binaries into {package}")
    return 0


def self_checks(device: torch.device, ops: Sequence[str], impl: str = "") -> int:
    """The checks that ``accelerate`` makes before it trusts a kernel; what is remembered is shown, not made again.

    Of Triton's kernels of attention that one is checked which the launch table says.
    """
    fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    failed = False
    for backend in _backends(device, impl):
        known = [(op, variant) for op, variants in formats.VARIANTS[backend].items() for variant in variants]
        able = [(op, variant) for op, variant in known if fp8 or not formats.uses_e4m3(variant)]
        wanted = [(op, variant) for op, variant in able if not ops or op in ops]
        for check, new in trust.checked(backend, device, wanted):
            verdict, when = "passed" if check.passed else "FAILED", f"{check.seconds:.1f} s" if new else "remembered"
            print(f"{backend} {check.op} {check.variant}: {verdict}, {check.detail}, {when}", flush=True)
            if new and check.fault == self_check.LOST:
                print(f"STOPPED: {backend} {check.op} {check.variant} took the GPU from this process", flush=True)
                return LOST
            failed |= not check.passed
    return int(failed)


def _backends(device: torch.device, impl: str) -> list[str]:
    """Triton, and CUDA where it can run, or the one that is named; says why where it cannot."""
    why_not = cuda_obstacle(device)
    if why_not is not None and impl in ("", "cuda"):
        print(f"cuda: not checked: {why_not}")
    return [name for name in ("triton", "cuda") if impl in ("", name) and not (name == "cuda" and why_not)]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where something failed, 3 where the GPU is lost to this process."""
    parser = argparse.ArgumentParser(prog="python -m bench.checks", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("native", "self"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="comma-separated ops of the self-check")
    parser.add_argument("--impl", choices=("triton", "cuda"), default="", help="of self; or all")
    parser.add_argument("--into", type=Path, default=bootstrap.ROOT / "happyhorse_fast", help="where native builds")
    options = parser.parse_args(argv)
    if options.what == "native":
        return native(options.into)
    return self_checks(torch.device(options.device), [op for op in options.only.split(",") if op], options.impl)


if __name__ == "__main__":
    sys.exit(main())
