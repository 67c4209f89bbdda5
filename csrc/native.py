"""Build the pybind11 module, and the device binaries with ninja, which compiles only what changed.

No header of torch or CUDA is included, so neither the build nor its results depend on a version of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import sources

MODULE = Path(__file__).parent / "host" / "block_map.cpp"
MANIFEST = "manifest.json"
MODULE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra")
# A stack frame or a spill fails the build. -warn-spills would not do: it passes a kernel that keeps an array of 1,200
# bytes in local memory.
DEVICE_FLAGS = (*sources.OPTIONS, "-O3", "-Xptxas", "-warn-lmem-usage,-Werror")


def compiler() -> list[str] | None:
    """Return the C++ compiler as a command, None where there is none.

    Where ``CXX`` is set, only that counts. Else it is the first on the PATH of: the compiler that this Python was built
    with, which may exist on another machine only, ``c++`` and ``g++``.
    """
    named = os.environ.get("CXX")
    for text in [named] if named else [sysconfig.get_config_var("CXX") or "c++", "c++", "g++"]:
        command = shlex.split(text)
        if command and shutil.which(command[0]):
            return command
    return None


def nvcc() -> str | None:
    """Return the path of nvcc, from the PATH, ``CUDA_HOME`` or ``CUDA_PATH``; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def build(package: Path, root: Path) -> Path:
    """Build a package's compiled parts: the host module, and CUDA binaries where there is nvcc.

    Each is built even if the other fails: without Python's headers there are still binaries.

    Args:
        package: Folder that both go to.
        root: The checkout. Binaries are kept in its ``build/``, so that a second build compiles only changes.

    Returns:
        Path of the host module.

    Raises:
        RuntimeError: As :func:`build_module` and :func:`build_binaries`.
        CalledProcessError: Likewise.
    """
    module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        build_module(module)
    finally:
        build_binaries(package / "cubins", root / "build" / "native" / "cubins")
    return module


def build_module(output: Path) -> None:
    """Compile and link ``happyhorse_fast._C``.

    Args:
        output: The shared object, with the suffix that this Python imports.

    Raises:
        RuntimeError: There is no C++ compiler.
        CalledProcessError: It does not compile; the compiler has said why on stderr.
    """
    import pybind11

    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler found: install g++ or clang++, or name one in CXX")
    include = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    flags = [*MODULE_FLAGS, *include, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    link = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    link += shlex.split(os.environ.get("LDFLAGS", ""))
    output.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, *flags, str(MODULE), "-o", str(output), *link], check=True)


def build_binaries(folder: Path, work: Path) -> None:
    """Compile every translation unit to a binary per architecture, and write a manifest of them.

    Without nvcc only the manifest is written, without binaries.

    Args:
        folder: Folder that they go to. Any other file in it is removed.
        work: Folder of intermediate files, kept between builds.

    Raises:
        RuntimeError: There is no ninja, or ``MAX_JOBS`` is no positive number.
        CalledProcessError: A unit does not compile, or uses local memory; the compiler has said why on stderr.
    """
    path = nvcc()
    if path is None:
        print(
            "happyhorse-fast: no nvcc on the PATH or in CUDA_HOME, so no CUDA binaries are built; NVRTC compiles the"
            " kernels at first use (pip install 'happyhorse-fast[cuda]')",
            file=sys.stderr,
        )
        _install(folder, {"nvcc": None, "stems": {}}, [])
        return
    release = re.search(r"V(\d+\.\d+\.\d+)", _output([path, "--version"]))
    if release is None:
        raise RuntimeError(f"{path} --version names no version")
    known = set(_output([path, "--list-gpu-code"]).split()) | {"sm_90a"}
    architectures = [name for name in sources.ARCHITECTURES if name in known]
    if len(architectures) < len(sources.ARCHITECTURES):
        print(f"happyhorse-fast: {path} {release[0]} builds for {', '.join(architectures)} alone", file=sys.stderr)

    work = work / release[0]  # another version of nvcc compiles everything again
    # Digests come before compiling: where a file changes meanwhile, the binary then counts as outdated, not as current.
    digests = {stem: sources.digest(stem) for stem in sources.stems()}
    edges = []
    for name in architectures:
        flags = [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}", "-cubin", *DEVICE_FLAGS]
        edges.append(_rule(name, [path, *flags, "-MMD", "-MF", "$out.d", "$in", "-o", "$out"]))
        for stem in digests:
            edges.append(f"build {stem}.{name}.cubin: {name} {_escaped(sources.DEVICE / f'{stem}.cu')}")
    _ninja(work, edges)

    described: dict[str, Any] = {}
    files: list[Path] = []
    for stem, text in digests.items():
        built = {name: work / f"{stem}.{name}.cubin" for name in architectures}
        checksums = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in built.items()}
        described[stem] = {"sources": text, "binaries": checksums}
        files += built.values()
    _install(folder, {"nvcc": release[1], "stems": described}, files)


def _install(folder: Path, manifest: dict[str, Any], files: Iterable[Path]) -> None:
    """Fill ``folder`` with these files and the manifest, and nothing else. The manifest is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for file in files:
        shutil.copy2(file, folder / file.name)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _rule(name: str, command: Iterable[str]) -> str:
    """Write a rule of ninja, whose command says in ``$out.d`` what else it read."""
    line = " ".join(word if word.startswith("$") else shlex.quote(word).replace("$", "$$") for word in command)
    return f"rule {name}\n  command = {line}\n  depfile = $out.d\n  deps = gcc\n"


def _escaped(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path.resolve()))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ninja(work: Path, edges: Iterable[str]) -> None:
    jobs = os.environ.get("MAX_JOBS", "2")
    if not jobs.isdecimal() or int(jobs) < 1:
        raise RuntimeError(f"MAX_JOBS is {jobs!r}, a positive number is allowed")
    program = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
    if program is None:
        raise RuntimeError("ninja is not installed: pip install ninja")
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text("\n".join(edges) + "\n")
    subprocess.run([program, "-C", str(work), "-j", jobs, "-k", "0"], check=True)
