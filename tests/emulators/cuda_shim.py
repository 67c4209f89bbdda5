"""Runs CUDA kernels on the CPU: builds csrc/ with the host compiler and hands launches to its shim.

    shim = Shim()                       # builds on first use, remembered by the sources' digest
    with shim.order(2):                 # threads and blocks in another order: results must not change by a bit
        result = op(..., backend="cuda")

What a launch does wrong comes as :class:`ShimError`: a deadlock, a barrier that not all threads reach, lanes that part.
`HAPPYHORSE_FAST_SANITIZE=1` builds with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
# No contraction: nvcc gets --fmad=false, so that a * b + c is two roundings on both sides unless written as fmaf.
FLAGS = ("-std=c++17", "-fPIC", "-DHH_SHIM", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror")
FLAGS += ("-Wno-unknown-pragmas", "-Wno-array-bounds", f"-I{CSRC / 'device'}")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")


class ShimError(RuntimeError):
    """What a kernel did wrong, with block, thread and line."""


class _Index(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("params", ctypes.c_void_p),
        ("params_bytes", ctypes.c_uint64),
        ("grid", _Index),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint64),
        ("order", ctypes.c_uint),
    ]


def build(folder: Path, sources: list[Path], *, sanitize: bool, once: bool = False) -> Path:
    """Compile ``sources`` and the shim into a shared library in ``folder``; what is there is not compiled again.

    Of sources that run ``once`` it optimises less: compiling them takes longer than running them.
    """
    flags = [*FLAGS, *(SANITIZERS if sanitize else ())]
    shim = sorted(CSRC.glob("shim/*.cpp"))
    common = hashlib.sha256(" ".join(flags).encode())
    for header in sorted([*CSRC.glob("device/*.cuh"), *CSRC.glob("shim/*.hpp")]):
        common.update(header.name.encode() + header.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in [*sources, *shim]:
        level = "-O1" if sanitize or (once and source not in shim) else "-O2"
        digest = common.copy()
        digest.update(level.encode() + source.read_bytes())
        objects.append(folder / f"{source.stem}-{digest.hexdigest()[:16]}.o")
        _make(objects[-1], [*flags, level, "-c", "-x", "c++", str(source)])
    whole = hashlib.sha256("\n".join(path.name for path in objects).encode())
    library = folder / f"shim-{whole.hexdigest()[:16]}.so"
    _make(library, [*flags, "-shared", *map(str, objects)])
    return library


def _make(output: Path, arguments: list[str]) -> None:
    """Run the compiler for a file that is not there; workers of one run do it once."""
    with open(f"{output}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():
            return
        with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
            made = f"{temporary}/{output.name}"
            command = [os.environ.get("CXX", "g++"), *arguments, "-o", made]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"the shim does not compile:\n{result.stderr}")
            os.replace(made, output)


class Shim:
    """The runner of CUDA launches for tensors on the CPU.

    Args:
        sources: Files with kernels; all of csrc/device/ where None.
        once: Whether they run but once, so that they are to be compiled fast.
    """

    def __init__(self, sources: list[Path] | None = None, *, once: bool = False) -> None:
        self.sources, self._once = sorted(CSRC.glob("device/*.cu")) if sources is None else sources, once
        self.launches: list[str] = []
        self._order = 0

    @functools.cached_property
    def library(self) -> ctypes.CDLL:
        sanitize = os.environ.get("HAPPYHORSE_FAST_SANITIZE") == "1"
        folder = CSRC.parent / ".build" / "shim"
        return ctypes.CDLL(str(build(folder, self.sources, sanitize=sanitize, once=self._once)))

    @contextlib.contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Threads and blocks ascending (0), descending (1) or shuffled by a seed (2 and up)."""
        before, self._order = self._order, seed
        try:
            yield
        finally:
            self._order = before

    def __call__(
        self,
        stem: str,
        kernel: str,
        params: ctypes.Structure,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
    ) -> None:
        """Run one launch to its end."""
        self.launches.append(kernel)
        launch = _Launch(
            ctypes.addressof(params), ctypes.sizeof(params), _Index(*grid), threads, shared_bytes, self._order
        )
        message = ctypes.create_string_buffer(4096)
        run = getattr(self.library, f"shim_run_{kernel}")
        run.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64]
        if run(ctypes.addressof(launch), message, len(message)):
            raise ShimError(f"{stem}: {kernel}: {message.value.decode()}")


SHIM = Shim()
"""Of the whole test run; `conftest.py` installs it."""
