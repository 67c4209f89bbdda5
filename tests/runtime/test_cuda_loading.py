"""Which code a GPU and its driver get: a binary, or NVRTC's and its cache; and what is said where there is none."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from logged import logs

from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime import cache_folder
from happyhorse_fast.ops.runtime.cuda import binaries, images, nvrtc
from happyhorse_fast.ops.runtime.cuda.errors import CudaError

HOPPER = (9, 0)
R580, R550 = 13000, 12040
KERNEL = 'extern "C" __global__ void {}(float* x) {{ x[threadIdx.x] *= 2.0f; }}\n'


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Device code of one translation unit that compiles at once, no binaries, and a cache of its own."""
    folder = tmp_path / "device"
    folder.mkdir()
    (folder / "unit.cu").write_text(KERNEL.format("unit"))
    monkeypatch.setattr(sources, "DEVICE", folder)
    monkeypatch.setattr(binaries, "FOLDER", tmp_path / "cubins")
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path / "cache"))
    return folder


def install() -> Path:
    """Binaries of the unit as a build leaves them, each with its name as its content."""
    entries = {}
    binaries.FOLDER.mkdir(exist_ok=True)
    for target in sources.ARCHITECTURES:
        name = f"unit.{target}.cubin"
        (binaries.FOLDER / name).write_text(name)
        entries[target] = hashlib.sha256(name.encode()).hexdigest()
    stems = {"unit": {"sources": sources.digest("unit"), "binaries": entries}}
    (binaries.FOLDER / "manifest.json").write_text(json.dumps({"nvcc": "13.0.88", "stems": stems}))
    return binaries.FOLDER


def obstacle(capability: binaries.Capability, driver: int) -> str | None:
    """Why a GPU and its driver get no code."""
    try:
        images.fingerprint(capability, driver)
    except CudaError as error:
        return str(error)
    return None


def without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuda-bindings is where NVRTC's library is not installed."""

    def absent() -> Any:
        raise RuntimeError("Failure finding libnvrtc.so\nin many places")

    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", SimpleNamespace(nvrtcVersion=absent))


# Binaries -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((7, 5), []),
        ((8, 0), ["sm_80"]),
        ((8, 6), ["sm_80"]),
        ((8, 9), ["sm_89", "sm_80"]),
        ((9, 0), ["sm_90a"]),
        ((10, 0), ["sm_100"]),
        ((10, 3), ["sm_100"]),
        ((11, 0), []),
        ((12, 0), ["sm_120"]),
        ((12, 1), ["sm_120"]),
        ((13, 0), []),
    ],
)
def test_a_gpu_gets_the_nearest_binary_first(capability: tuple[int, int], served: list[str]) -> None:
    install()
    found, why_not = binaries.usable("unit", capability, R580)
    assert list(found) == [f"unit.{target}.cubin" for target in served]
    number = "".join(map(str, capability))
    targets = "sm_80, sm_89, sm_90a, sm_100, sm_120"
    assert why_not == ("" if served else f"binaries of unit are for {targets}, this GPU is sm_{number}")


def test_a_driver_that_is_older_than_the_binaries_gets_none() -> None:
    install()
    reason = "the binaries of unit need a driver for CUDA 13.0, this one is for CUDA 12.4"
    assert binaries.usable("unit", HOPPER, R550) == ({}, reason)
    assert list(binaries.usable("unit", HOPPER, 13010)[0]) == ["unit.sm_90a.cubin"]


def test_binaries_that_are_older_than_the_sources_are_not_used(device: Path) -> None:
    install()
    (device / "unit.cu").write_text(KERNEL.format("unit") + "\n")
    assert binaries.usable("unit", HOPPER, R580) == ({}, "the binaries of unit are older than its sources")


@pytest.mark.parametrize("target", ["sm_9", "90", "sm_80b", ""])
def test_a_target_that_is_none_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="such as sm_90a is allowed"):
        binaries.serves(target, HOPPER)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no binaries are installed"),
        ('{"nvcc": "13', "cannot be read"),
        ('{"nvcc": null, "stems": {}}', "no binaries were built: there was no nvcc"),
        ('{"nvcc": "13.0.88", "stems": {}}', "no binary of unit was built"),
    ],
)
def test_a_manifest_that_does_not_serve_has_a_reason(text: str | None, reason: str) -> None:
    binaries.FOLDER.mkdir()
    if text is not None:
        (binaries.FOLDER / "manifest.json").write_text(text)
    found, why_not = binaries.usable("unit", HOPPER, R580)
    assert found == {}
    assert reason in why_not


# Order of preference --------------------------------------------------------------------------------------------------


def loaded(driver: int, refuses: tuple[str, ...] = ()) -> tuple[str, str]:
    """(code, name) of what is loaded on Hopper; code that names one of ``refuses`` is not accepted."""

    def accept(code: bytes) -> str:
        text = code.decode(errors="replace")
        if any(word in text for word in refuses):
            raise CudaError(f"CUDA_ERROR_INVALID_IMAGE: {text}")
        return text

    return images.load("unit", HOPPER, driver, accept)


def test_the_binary_is_taken_and_nvrtc_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with logs(None):
        assert loaded(R580) == ("unit.sm_90a.cubin", "unit.sm_90a.cubin")
    assert images.first("unit", HOPPER, R580) == "unit.sm_90a.cubin"
    assert obstacle(HOPPER, R580) is None


@pytest.mark.parametrize("content", [b"", b"unit.sm_90a.cubi", b"unit.sm_80.cubin", None])
def test_a_corrupt_binary_is_reported_and_the_next_taken(content: bytes | None) -> None:
    file = install() / "unit.sm_90a.cubin"
    file.unlink() if content is None else file.write_bytes(content)
    reason = "cannot be read" if content is None else "is not the file that was built"
    with logs(rf"unit\.sm_90a\.cubin {reason}.*the next best code is tried"):
        assert loaded(R580)[1] == "NVRTC 13.0"
    assert images.first("unit", HOPPER, R580) == "NVRTC 13.0"


def test_code_that_the_driver_refuses_is_reported_and_the_next_taken() -> None:
    install()
    with logs("CUDA_ERROR_INVALID_IMAGE") as warned:
        code, name = loaded(R580, refuses=("unit.sm_90a",))
    assert len(warned) == 1
    assert name == "NVRTC 13.0"
    assert code[1:4] == "ELF"


def test_where_nothing_serves_the_error_has_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    without_nvrtc(monkeypatch)
    with pytest.raises(CudaError) as caught:
        loaded(R550)
    message = str(caught.value)
    assert "the binaries of unit need a driver for CUDA 13.0, this one is for CUDA 12.4" in message
    assert "NVRTC is not installed (Failure finding libnvrtc.so): pip install nvidia-cuda-nvrtc" in message
    assert obstacle(HOPPER, R550) == message


def test_without_cuda_bindings_the_obstacle_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    assert "pip install 'happyhorse-fast[cuda]'" in str(obstacle(HOPPER, R580))


def test_a_driver_older_than_nvrtc_and_all_binaries_is_an_obstacle() -> None:
    install()
    reason = "NVRTC 13.0 makes code that a driver for CUDA 12.4 does not load"
    assert reason in str(obstacle(HOPPER, R550))


def test_an_old_gpu_is_an_obstacle() -> None:
    install()
    assert obstacle((7, 5), R580) == "CUDA kernels need sm_80 or later, this GPU is sm_75"


# NVRTC ----------------------------------------------------------------------------------------------------------------

KNOWN = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((8, 6), "sm_86"),
        ((9, 0), "sm_90a"),
        ((10, 3), "sm_103"),
        ((10, 7), "sm_103"),
        ((12, 4), "sm_121"),
        ((13, 0), "compute_121"),
    ],
)
def test_nvrtc_compiles_for_the_gpu_or_the_nearest_it_runs(capability: tuple[int, int], wanted: str) -> None:
    assert nvrtc.target(capability, KNOWN) == wanted


def test_nvrtc_of_today_compiles_ptx_for_the_gpus_of_tomorrow_only_where_the_driver_is_as_new() -> None:
    with pytest.raises(CudaError, match="NVRTC compiles for sm_75 and later, this GPU is sm_70"):
        nvrtc.target((7, 0), KNOWN)
    assert nvrtc.obstacle((13, 0), 13000) is None
    assert nvrtc.obstacle(HOPPER, 13000) is None
    assert nvrtc.obstacle(HOPPER, 12090) is not None


def test_a_compile_error_has_the_compilers_words(device: Path) -> None:
    (device / "unit.cu").write_text('#include "gone.cuh"\nsyntax error\n')
    with pytest.raises(FileNotFoundError, match=r"gone\.cuh"):
        nvrtc.compile("unit", "sm_90a")
    (device / "unit.cu").write_text("syntax error\n")
    with pytest.raises(CudaError, match=r"NVRTC does not compile unit for sm_90a: .*\n(.*\n)*unit.cu\(1\): error"):
        nvrtc.compile("unit", "sm_90a")


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units that NVRTC really compiles."""
    done: list[str] = []
    compile = nvrtc.compile
    monkeypatch.setattr(nvrtc, "compile", lambda stem, wanted: (done.append(wanted), compile(stem, wanted))[1])
    return done


def test_what_was_compiled_is_kept_for_this_user_alone(compiles: list[str]) -> None:
    code = nvrtc.compiled("unit", HOPPER, R580)
    assert code.startswith(b"\x7fELF")
    assert nvrtc.compiled("unit", HOPPER, R580) == code
    assert compiles == ["sm_90a"]
    (file,) = cache_folder.cache_folder().iterdir()
    assert cache_folder.cache_folder().stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_other_sources_options_nvrtc_or_driver_are_compiled_again(
    compiles: list[str], device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {nvrtc.cache_path("unit", "sm_90a", R580), nvrtc.cache_path("unit", "sm_90a", 13010)}
    paths.add(nvrtc.cache_path("unit", "sm_89", R580))
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "version", lambda: 13010)
        paths.add(nvrtc.cache_path("unit", "sm_90a", R580))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "OPTIONS", ("-std=c++17",))
        paths.add(nvrtc.cache_path("unit", "sm_90a", R580))
    (device / "unit.cu").write_text(KERNEL.format("unit") + "// changed\n")
    paths.add(nvrtc.cache_path("unit", "sm_90a", R580))
    assert len(paths) == 6


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_corrupt_cached_file_is_reported_and_compiled_again(damage: str, compiles: list[str]) -> None:
    code = nvrtc.compiled("unit", HOPPER, R580)
    (file,) = cache_folder.cache_folder().iterdir()
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-1], "changed": content[:-1] + b"?", "empty": b""}[damage])
    with logs("cannot be used and is compiled again: its digest does not match"):
        assert nvrtc.compiled("unit", HOPPER, R580) == code
    assert len(compiles) == 2
    with logs(None):
        assert nvrtc.compiled("unit", HOPPER, R580) == code
    assert len(compiles) == 2


def test_a_cache_that_cannot_be_written_is_an_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    reason = str(obstacle(HOPPER, R580))
    assert "the cache of compiled kernels cannot be written" in reason
    assert cache_folder.CACHE_VARIABLE in reason
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    assert "may be written by others" in str(obstacle(HOPPER, R580))
    install()
    assert obstacle(HOPPER, R580) is None, "no cache is needed where a binary serves"


def test_a_file_that_cannot_be_kept_is_reported_and_the_code_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with logs("compiled kernels of unit cannot be kept: .*No space left"):
        assert nvrtc.compiled("unit", HOPPER, R580).startswith(b"\x7fELF")


def test_the_fingerprint_changes_with_the_sources_and_with_what_compiled_them(device: Path) -> None:
    by_nvrtc = images.fingerprint(HOPPER, R580)
    install()
    built = images.fingerprint(HOPPER, R580)
    (device / "unit.cu").write_text(KERNEL.format("unit") + "\n")
    install()
    assert len({by_nvrtc, built, images.fingerprint(HOPPER, R580)}) == 3
