"""The build of csrc/: what a binary depends on, what is compiled again, what must not compile, what may be absent."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from happyhorse_fast.csrc import native, sources

needs_nvcc = pytest.mark.skipif(native.nvcc() is None, reason="no nvcc on the PATH or in CUDA_HOME")

HEADER = "struct Params { float* x; int n; };\n"
KERNEL = """#include "{header}"
extern "C" __global__ void {name}(const __grid_constant__ Params p) {{ if (p.n > 0) p.x[threadIdx.x] *= 2.0f; }}
"""
# An array that is indexed by data lies in local memory: 1,200 bytes of stack, and not one spill.
ARRAY = """struct Params { float* x; int n; };
extern "C" __global__ void array(const __grid_constant__ Params p) {
  float held[300];
  for (int i = 0; i < 300; ++i) held[i] = p.x[i * p.n];
  float sum = 0.0f;
  for (int i = 0; i < p.n; ++i) { sum += held[(i * 7) % 300]; held[(i * 5) % 300] = sum; }
  p.x[threadIdx.x] = sum;
}
"""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two translation units, each with a header of its own, in place of ours."""
    folder = tmp_path / "device"
    monkeypatch.setattr(sources, "DEVICE", folder)
    folder.mkdir()
    for name in ("first", "second"):
        (folder / f"{name}.cuh").write_text(HEADER)
        (folder / f"{name}.cu").write_text(KERNEL.format(header=f"{name}.cuh", name=name))
    return folder


@pytest.fixture
def one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ARCHITECTURES", ("sm_90a",))


# Sources --------------------------------------------------------------------------------------------------------------


def test_a_unit_is_made_of_what_it_includes_and_nothing_else(device: Path) -> None:
    (device / "deep.cuh").write_text("")
    (device / "first.cuh").write_text('#pragma once\n  #  include "deep.cuh"\n#include "../shim/cuda.hpp"\n' + HEADER)
    assert list(sources.texts("first")) == ["deep.cuh", "first.cu", "first.cuh"]
    assert list(sources.texts("second")) == ["second.cu", "second.cuh"]
    (device / "deep.cuh").unlink()
    with pytest.raises(FileNotFoundError, match=r"deep\.cuh"):
        sources.texts("first")


def test_the_digest_changes_with_a_header_and_with_the_options(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {stem: sources.digest(stem) for stem in sources.stems()}
    (device / "first.cuh").write_text(HEADER + "\n")
    assert sources.digest("first") != before["first"]
    assert sources.digest("second") == before["second"]
    monkeypatch.setattr(sources, "OPTIONS", ("-std=c++20",))
    assert sources.digest("second") != before["second"]


def test_device_code_includes_no_header_but_its_own() -> None:
    """None of torch or CUDA: NVRTC has none, and a binary must not depend on the version of either."""
    for stem in sources.stems():
        for name, text in sources.texts(stem).items():
            assert re.findall(r"^\s*#\s*include\s*<.*", text, re.MULTILINE) == [], name


# Build ----------------------------------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.usefixtures("one_architecture")
def test_only_what_changed_is_compiled_again(device: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cubins"
    made = {f"{stem}.sm_90a.cubin" for stem in ("first", "second")}

    def compiled() -> set[str]:
        native.build_binaries(output, tmp_path / "work")
        text = capfd.readouterr().out
        return {stem for stem in ("first", "second") if f"-o {stem}.sm_90a.cubin" in text}

    assert compiled() == {"first", "second"}
    assert {path.name for path in output.iterdir()} == {"manifest.json", *made}
    assert compiled() == set()
    (device / "first.cuh").write_text(HEADER + "\n")
    assert compiled() == {"first"}
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["stems"]["first"]["sources"] == sources.digest("first")


@needs_nvcc
@pytest.mark.usefixtures("one_architecture")
def test_a_kernel_with_local_memory_does_not_build(
    device: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for other in device.iterdir():
        other.unlink()
    (device / "array.cu").write_text(ARRAY)
    with pytest.raises(subprocess.CalledProcessError):
        native.build_binaries(tmp_path / "cubins", tmp_path / "work")
    captured = capfd.readouterr()
    assert "Local memory used for function 'array', size of stack frame: 1200 bytes" in captured.out + captured.err
    assert not (tmp_path / "cubins").exists()


@pytest.mark.usefixtures("device")
def test_without_nvcc_the_build_says_so_and_leaves_no_binaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cubins").mkdir()
    (tmp_path / "cubins" / "first.sm_90a.cubin").write_bytes(b"of another build")
    monkeypatch.setattr(native, "nvcc", lambda: None)
    native.build_binaries(tmp_path / "cubins", tmp_path / "work")
    assert "no nvcc on the PATH or in CUDA_HOME, so no CUDA binaries are built" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cubins").iterdir()] == ["manifest.json"]
    assert json.loads((tmp_path / "cubins" / "manifest.json").read_text())["nvcc"] is None


def test_nvcc_is_found_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert native.nvcc() is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    assert native.nvcc() == str(tmp_path / "bin" / "nvcc")


def test_a_compiler_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert native.compiler() is None
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        native.build_module(tmp_path / "_C.so")


@pytest.mark.parametrize(
    ("built_with", "there", "found"),
    [
        ("elsewhere++ -pthread", ["g++"], ["g++"]),
        ("elsewhere++ -pthread", ["c++", "g++"], ["c++"]),
        ("elsewhere++ -pthread", ["elsewhere++", "g++"], ["elsewhere++", "-pthread"]),
        (None, ["g++"], ["g++"]),
        ("elsewhere++", [], None),
    ],
)
def test_a_compiler_is_looked_for_where_that_of_this_python_is_not_there(
    built_with: str | None, there: list[str], found: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.sysconfig, "get_config_var", lambda _: built_with)
    assert native.compiler() == found


def test_binaries_are_built_where_the_host_module_is_not_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def part(name: str, fails: bool) -> Callable[..., None]:
        def build(*_: Path) -> None:
            tried.append(name)
            if fails:
                raise RuntimeError(f"no {name}")

        return build

    for failing in ("module", "binaries"):
        for name in ("module", "binaries"):
            monkeypatch.setattr(native, f"build_{name}", part(name, name == failing))
        with pytest.raises(RuntimeError, match=f"no {failing}"):
            native.build(tmp_path, tmp_path)
    assert tried == ["module", "binaries"] * 2


@pytest.mark.parametrize("jobs", ["0", "-1", "two", ""])
def test_a_number_of_jobs_that_is_none_is_refused(jobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(RuntimeError, match=f"MAX_JOBS is '{jobs}', a positive number is allowed"):
        native._ninja(tmp_path, [])
