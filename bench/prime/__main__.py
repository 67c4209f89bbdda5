"""Compile ahead of time what a GPU run launches, without a GPU, into one file: ``make prime``, before ``make gpu``.

python -m bench.prime --triton .aot/triton-3.6.0 --build .aot/triton-3.6.0-python3.12

Every launch of `prime.launches` is compiled for one architecture by one version of Triton into ``.primed/``, where
`make gpu` looks. A cache is of one build of Triton, and the builds of a version differ by Python: ``--build`` or
``--key`` name the one that will look, where it is not the one that compiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.bootstrap import PRIMED_VARIABLE
from bench.prime import file as primed
from bench.processes import CommandFailed, compiling, json_lines

KERNELS_EACH = 30
"""Of one process: the compiler's memory grows."""


def prime(arch: int, triton: Path | None, jobs: int, key: Sequence[str], cache: Path, only: str = "") -> dict[str, Any]:
    """Fill a cache; what was compiled, and what failed.

    Args:
        arch: Compute capability as 90 for 9.0.
        triton: Folder with the version that compiles, None for the installed one.
        jobs: Processes side by side.
        key: More arguments of `bench.prime.compile`: whose cache it is.
        cache: Folder; what it holds already is not compiled again.
        only: Regular expression over the names of `bench.prime.launches`' sources.

    Raises:
        RuntimeError: Nothing is launched, or what looks for launches failed.
    """
    # Of what a launch needs nothing but the binary is kept.
    for_cache = {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1", PRIMED_VARIABLE: "1"}
    env, architecture = compiling(triton) | for_cache, ("--arch", str(arch))
    began = time.monotonic()
    found = list(json_lines([sys.executable, "-m", "bench.prime.launches", *architecture, "--only", only], env))
    if not found:
        raise RuntimeError(f"bench.prime.launches found nothing that sm_{arch} launches with {only!r} in its name")
    print(f"{len(found)} kernels to compile for sm_{arch} ({time.monotonic() - began:.0f} s)", flush=True)
    done: dict[str, Any] = {"arch": arch, "kernels": len(found), "new": 0, "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        launches, shards = Path(folder) / "launches.jsonl", -(-len(found) // KERNELS_EACH)
        launches.write_text("".join(json.dumps(kernel) + "\n" for kernel in found))

        def shard(number: int) -> None:
            options = (str(launches), *architecture, "--shard", f"{number}/{shards}", *key)
            missing = len(found[number::shards])
            try:
                for said in json_lines([sys.executable, "-m", "bench.prime.compile", *options], env):
                    if "key" in said:  # the first line, of the build
                        done.update(said)
                        continue
                    missing -= 1
                    done["new"] += said.get("new", False)
                    what, failure = f"{said['kernel']} of {said['source']}", said.get("failure")
                    if failure:
                        done["failures"].append(f"{what} does not compile: {failure}")
                    state = failure or ("compiled" if said["new"] else "was there")
                    print(f"{what}: {state} ({said['seconds']} s)", flush=True)
            except CommandFailed as error:
                done["failures"].append(str(error))
            if missing:
                done["failures"].append(f"shard {number} of {shards} ended {missing} kernels early")

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(shard, range(shards)))
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a kernel does not compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.prime", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0")
    parser.add_argument("--triton", type=Path, help="folder with the version of Triton to compile with")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--only", default="", help="regular expression over what launches, such as '^self-check'")
    parser.add_argument("--into", type=Path, default=primed.FOLDER, help="folder of the file, .primed of the checkout")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--build", type=Path, help="folder with the build of that version that the GPU's machine has")
    key.add_argument("--key", type=Path, help="or the file that `make gpu` left there")
    options = parser.parse_args(argv)
    began = time.monotonic()
    named = next(((f"--{n}", str(v.resolve())) for n in ("build", "key") if (v := getattr(options, n))), ())
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        done = prime(options.arch, options.triton, options.jobs, named, cache, options.only)
        if "key" not in done:
            print("\n".join(done["failures"]), file=sys.stderr)
            return 1
        target = options.into / f"sm_{options.arch}-triton-{done['triton']}-{done['key'][:8]}{primed.SUFFIX}"
        manifest = {name: done[name] for name in ("triton", "arch", "key")}
        primed.pack(cache, target, manifest | {"kernels": primed.kernels(cache)})
    for failure in done["failures"]:
        print(failure, file=sys.stderr)
    minutes, size = (time.monotonic() - began) / 60, target.stat().st_size / 2**20
    print(f"{done['new']} of {done['kernels']} kernels compiled in {minutes:.1f} minutes: {target} ({size:.1f} MiB)")
    return int(bool(done["failures"]))


if __name__ == "__main__":
    sys.exit(main())
