"""Compile a part of what `bench.prime.launches` found into TRITON_CACHE_DIR, without a GPU: one process, one Triton.

Each kernel takes the way that Triton's JIT goes after it has specialised a launch, so that its place in the cache is
the one where the launch looks.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import importlib
import json
import re
import sys
import time
from pathlib import Path
from types import FunctionType
from typing import Any

import triton
from triton.runtime import cache

from bench.aot.compile import Driver
from bench.prime.file import digest, version_key


def key_of(folder: Path) -> str:
    """The version key, as :func:`bench.prime.file.version_key`, of another build of the installed version of Triton.

    Args:
        folder: That holds it, such as the build for another Python: only its library differs.

    Raises:
        ValueError: It is of another version.
    """
    found = re.search(r"__version__ = '([^']+)'", (folder / "triton" / "__init__.py").read_text())
    if found is None or found[1] != triton.__version__:
        other = found[1] if found else "none"
        raise ValueError(f"build must hold Triton {triton.__version__}, which compiles here; {folder} holds {other}")
    own: Any = cache.triton_key.__wrapped__
    # It hashes what lies around its own file.
    around = own.__globals__ | {"__file__": str(folder / "triton" / "runtime" / "cache.py")}
    return str(FunctionType(own.__code__, around)())


def compile_kernel(kernel: dict[str, Any]) -> bool:
    """Compile one line of `bench.prime.launches`; whether it was not in the cache."""
    compiled = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(not cache_hit)
    getattr(importlib.import_module(kernel["module"]), kernel["kernel"]).preload(kernel["specialised"])
    (new,) = compiled
    return new


def main() -> None:
    """Print the version's digest, then a line per kernel, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("launches", type=Path, help="output of bench.prime.launches")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--shard", default="0/1", help="which of how many")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--build", type=Path, help="folder with the build of Triton that will look")
    key.add_argument("--key", type=Path, help="file with that build's key, which `make gpu` leaves where it finds none")
    options = parser.parse_args()
    if bootstrap.INTERPRETED:
        sys.exit("TRITON_INTERPRET must not be set: nothing would be compiled")
    driver = Driver()
    driver.arch = options.arch
    triton.runtime.driver.set_active(driver)
    wanted = (
        key_of(options.build) if options.build else options.key.read_text().strip() if options.key else version_key()
    )
    cache.triton_key = lambda: wanted
    print(json.dumps({"triton": triton.__version__, "arch": options.arch, "key": digest(wanted)}), flush=True)
    shard, shards = map(int, options.shard.split("/"))
    for line in options.launches.read_text().splitlines()[shard::shards]:
        kernel = json.loads(line)
        began = time.perf_counter()
        said: dict[str, Any] = {"kernel": kernel["kernel"], "source": kernel["source"]}
        try:
            said["new"] = compile_kernel(kernel)
        except Exception as error:  # the compiler's own errors are of many kinds; one must not hide the others
            said["failure"] = f"{type(error).__name__}: {str(error)[-500:]}"
        print(json.dumps(said | {"seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
