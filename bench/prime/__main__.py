"""Compile ahead of time what a GPU run launches, without a GPU, into one file: ``make prime``, before ``make gpu``.

PYTHONPATH=.aot/triton-3.6.0 python -m bench.prime --build .aot/triton-3.6.0-python3.12

Every launch of `prime.launches` is compiled for one architecture, by the Triton that is imported, into ``.primed/``,
where `make gpu` looks. A cache is of one build of Triton, and the builds of a version differ by Python: ``--build`` or
``--key`` name the one that will look, where it is not the one that compiles. Each kernel takes the way that Triton's
JIT goes after it has specialised a launch, so that its place in the cache is the one where the launch looks.
"""

from __future__ import annotations

import bench.bootstrap as bootstrap  # isort: skip - first: maps the kernels

import argparse
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from triton.runtime import cache

from bench.aot.recording import Launch, in_forks
from bench.prime import file as primed
from bench.prime.launches import found
from happyhorse_fast.files import replacing


def compile_kernel(launch: Launch) -> None:
    """Compile a kernel into the cache."""
    launch.kernel.preload(launch.specialised)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a kernel does not compile.

    Raises:
        RuntimeError: Nothing is launched.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.prime", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--only", default="", help="regular expression over what launches, such as '^self-check'")
    parser.add_argument("--into", type=Path, default=primed.FOLDER, help="folder of the file, .primed of the checkout")
    of_build = parser.add_mutually_exclusive_group()
    of_build.add_argument("--build", type=Path, help="folder with the build of this version that the GPU's machine has")
    of_build.add_argument("--key", type=Path, help="or the file that `make gpu` left there")
    options = parser.parse_args(argv)
    began = time.monotonic()
    key = options.key.read_text().strip() if options.key else primed.version_key(options.build)
    target = primed.packed_in(options.into, options.arch, key)
    with tempfile.TemporaryDirectory() as folder:
        # Of what a launch needs nothing but the binary is kept.
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_STORE_BINARY_ONLY": "1"}
        bootstrap.settle_keys()
        launches = found(options.arch, options.only)
        if not launches:
            raise RuntimeError(f"nothing is launched on sm_{options.arch} with {options.only!r} in its name")
        said = f"{len(launches)} kernels to compile for sm_{options.arch}"
        print(f"{said} ({time.monotonic() - began:.0f} s)", flush=True)
        cache.triton_key = lambda: key
        _, failures = in_forks(compile_kernel, launches, options.jobs)
        count = primed.kernels(Path(folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, end=".partial") as partial, tarfile.open(partial, "w:gz") as archive:
            archive.add(folder, ".")
    for failure in failures:
        print(failure, file=sys.stderr)
    minutes, size = (time.monotonic() - began) / 60, target.stat().st_size / 2**20
    print(f"{count} kernels compiled in {minutes:.1f} minutes: {target} ({size:.1f} MiB)")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
