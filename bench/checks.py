"""What must hold before anything is timed: sources import, kernels pass their self-check, tiny shapes run clean.

Run as ``python -m bench.checks build``, ``self`` or ``tiny``.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch

from bench.cases import cases, select
from bench.gates import problems
from bench.inputs import make
from bench.results import describe_machine
from happyhorse_fast.ops import self_check, trust
from happyhorse_fast.ops.dispatch import STEMS


def build(device: torch.device) -> int:
    """Import every launcher, and say what runs where."""
    for stem in sorted(set(STEMS.values())):
        importlib.import_module(f"happyhorse_fast.ops.triton.{stem}")
    for name, value in describe_machine(device).items():
        print(f"{name}: {value}")
    print(f"device: {device}; kernels {'interpreted' if bootstrap.INTERPRETED else 'compiled'}")
    return 0


def self_checks(device: torch.device, ops: Sequence[str]) -> int:
    """The check that ``accelerate`` makes before it trusts a kernel."""
    kept = {op: check for op, check in self_check.CHECKS.items() if not ops or op in ops}
    self_check.CHECKS.clear()
    self_check.CHECKS.update(kept)
    fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    done = []
    for check in self_check.run_checks("triton", device, fp8=fp8):
        done.append(check)
        verdict = "passed" if check.passed else "FAILED"
        print(f"{check.op} {check.variant}: {verdict}, {check.detail}, {check.seconds:.1f} s", flush=True)
    if not ops:  # as `accelerate` would, which then need not check again
        for precision in {False, fp8}:
            known = [check for check in done if precision or check.variant == "bf16"]
            trust.remember(trust.machine_key("triton", device, fp8=precision), known)
    return int(any(not check.passed for check in done))


def tiny(device: torch.device, words: str) -> int:
    """Gates of tiny cases: what a memory checker is put around."""
    failed = 0
    for case in select(cases("tiny"), words):
        found = problems(case, make(case, device), "triton")
        failed += bool(found)
        print(f"{case.name}: {found[0] if found else 'ok'}", flush=True)
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.checks", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("build", "self", "tiny"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="comma-separated: ops of the self-check, words of tiny cases' names")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if options.what == "build":
        return build(device)
    if options.what == "self":
        return self_checks(device, [op for op in options.only.split(",") if op])
    return tiny(device, options.only)


if __name__ == "__main__":
    sys.exit(main())
