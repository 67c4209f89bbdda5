"""Calls that reach the driver: context, module, function, shared memory, parameters, stream; errors in words."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from happyhorse_fast.ops.runtime.cuda import images, status
from happyhorse_fast.ops.runtime.cuda import launch as launching
from happyhorse_fast.ops.runtime.cuda.errors import CudaError
from happyhorse_fast.ops.runtime.cuda.launch import MOST_SHARED_BYTES, cuda_obstacle, launch, use_runner

pytest.importorskip("cuda.bindings.nvrtc")  # imports the real driver module, so before the fake is in its place

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
STREAM = 77


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("n", ctypes.c_int)]


class FakeDriver:
    """Stands for cuda.bindings.driver: keeps what it is asked, fails where it is told to."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self, version: int = 13000) -> None:
        self.version = version
        self.calls: list[tuple[Any, ...]] = []
        self.fails: dict[str, Result] = {}
        self.launched: list[bytes] = []

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            failed = self.fails.get(name, Result.CUDA_SUCCESS)
            if name == "cuLaunchKernel" and failed is Result.CUDA_SUCCESS:
                pointer = ctypes.c_void_p.from_address(arguments[9]).value
                assert pointer is not None
                self.launched.append(ctypes.string_at(pointer, ctypes.sizeof(Params)))
            values: dict[str, tuple[Any, ...]] = {
                "cuDriverGetVersion": (self.version,),
                "cuDeviceGet": (0,),
                "cuDevicePrimaryCtxRetain": ("context",),
                "cuModuleLoadData": ("module",),
                "cuModuleGetFunction": (f"function {arguments[-1].decode()}" if name == "cuModuleGetFunction" else "",),
                "cuGetErrorString": (b"in the driver's words",),
            }
            return (failed, *values.get(name, ()))

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A Hopper GPU as torch and the driver show it, and code that any driver takes."""
    found = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(images, "load", lambda stem, capability, version, accept: (accept(b"\x7fELF"), f"{stem}.cubin"))
    remembered = launching._context, launching._module, launching._function
    for each in remembered:
        each.cache_clear()
    yield found
    for each in remembered:
        each.cache_clear()


def on_gpu(kernel: str = "kernel", grid: tuple[int, int, int] = (3, 2, 1), shared_bytes: int = 0, n: int = 5) -> Params:
    params = Params(x=4096, n=n)
    with FakeTensorMode():
        like = torch.empty(1, device=CUDA)
    launch("unit", kernel, params, grid, 128, shared_bytes, like)
    return params


# Launch ---------------------------------------------------------------------------------------------------------------


def test_a_launch_is_on_the_current_stream_in_torchs_context_with_one_struct(fake: FakeDriver) -> None:
    params = on_gpu()
    assert fake.launched == [bytes(params)]
    ((function, *shape, shared_bytes, stream, _, extra),) = fake.named("cuLaunchKernel")
    assert (function, shape, shared_bytes, stream, extra) == ("function kernel", [3, 2, 1, 128, 1, 1], 0, STREAM, 0)
    assert fake.named("cuCtxSetCurrent") == [("context",)]
    assert fake.named("cuModuleLoadData") == [(b"\x7fELF",)]


def test_module_and_function_are_loaded_once(fake: FakeDriver) -> None:
    for kernel in ("one", "one", "two"):
        on_gpu(kernel)
    assert len(fake.named("cuModuleLoadData")) == len(fake.named("cuDevicePrimaryCtxRetain")) == 1
    assert fake.named("cuModuleGetFunction") == [("module", b"one"), ("module", b"two")]
    assert len(fake.launched) == 3


def test_ptx_goes_to_the_driver_as_a_string_with_its_end(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "load", lambda stem, capability, version, accept: (accept(b".version 8.0"), "ptx"))
    on_gpu()
    assert fake.named("cuModuleLoadData") == [(b".version 8.0\0",)]


def test_a_function_is_told_once_what_shared_memory_it_may_have(fake: FakeDriver) -> None:
    for size in (0, 48 * 1024, 64 * 1024, 50 * 1024, MOST_SHARED_BYTES):
        on_gpu(shared_bytes=size)
    assert fake.named("cuFuncSetAttribute") == [("function kernel", "shared", MOST_SHARED_BYTES)]


def test_an_empty_grid_launches_nothing(fake: FakeDriver) -> None:
    on_gpu(grid=(3, 0, 1))
    assert fake.calls == []


REAL_BINDINGS = """
import contextlib, ctypes, types, torch
from happyhorse_fast.ops.runtime.cuda import images
from happyhorse_fast.ops.runtime.cuda.errors import CudaError
from happyhorse_fast.ops.runtime.cuda.launch import launch

class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("n", ctypes.c_int)]

torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.current_stream = lambda index: types.SimpleNamespace(cuda_stream=77)
images.load = lambda stem, capability, version, accept: (accept(b".version 8.0"), "unit.ptx")
for n in (5, -5):
    try:
        like = types.SimpleNamespace(device=torch.device("cuda", 0))
        launch("unit", "kernel", Params(4096, n), (3, 2, 1), 128, 65536, like)
    except CudaError as error:
        print(error)
"""
SAID = """retain 0
context 1
code .version 8.0
function kernel 1
attribute 1 8 101376
launch 1 (3, 2, 1) 128 threads, 65536 bytes, stream 77, x 4096, n 5, extra 0
context 1
launch 1 (3, 2, 1) 128 threads, 65536 bytes, stream 77, x 4096, n -5, extra 0
kernel kernel (unit.ptx) on cuda:0, grid (3, 2, 1), 128 threads, 65536 bytes of shared memory (or an earlier kernel): \
CUDA_ERROR_LAUNCH_FAILED: in the driver's words
"""


def test_the_real_bindings_hand_the_same_to_a_driver(tmp_path: Path) -> None:
    """cuda-bindings as it is, on a libcuda of our own: argument types that it does not take would show here."""
    source, library = Path(__file__).parents[1] / "emulators" / "fake_libcuda.cpp", tmp_path / "libcuda.so.1"
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", REAL_BINDINGS], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == (SAID, 0), done.stderr


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "result", "words"),
    [
        (
            "cuLaunchKernel",
            Result.CUDA_ERROR_INVALID_VALUE,
            [r"kernel kernel \(unit\.cubin\) on cuda:0", r"grid \(3, 2, 1\)"],
        ),
        ("cuLaunchKernel", Result.CUDA_ERROR_ILLEGAL_ADDRESS, ["128 threads, 65536 bytes", "or an earlier kernel"]),
        ("cuModuleGetFunction", Result.CUDA_ERROR_NOT_FOUND, [r"kernel kernel in unit\.cubin"]),
        ("cuModuleLoadData", Result.CUDA_ERROR_INVALID_VALUE, ["cuModuleLoadData"]),
        ("cuFuncSetAttribute", Result.CUDA_ERROR_INVALID_VALUE, ["101376 bytes of shared memory for kernel kernel"]),
        ("cuDevicePrimaryCtxRetain", Result.CUDA_ERROR_INVALID_VALUE, ["cuDevicePrimaryCtxRetain 0"]),
    ],
)
def test_an_error_of_the_driver_names_what_failed(
    call: str, result: Result, words: list[str], fake: FakeDriver
) -> None:
    fake.fails[call] = result
    with pytest.raises(CudaError, match=f"{result.name}: in the driver's words") as caught:
        on_gpu(shared_bytes=65536)
    for word in words:
        assert caught.match(word)


def test_a_first_launch_in_a_capture_is_refused_and_a_later_one_captured(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CudaError, match="launch it once before the capture"):
        on_gpu()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu()
    assert len(fake.launched) == 2


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes", "message"),
    [
        ((1, 65_536, 1), 32, 0, r"grid of kernel is \(1, 65536, 1\)"),
        ((-1, 1, 1), 32, 0, r"grid of kernel is \(-1, 1, 1\)"),
        ((1, 1), 32, 0, "3 sizes"),
        ((1, 1, 1), 0, 0, "threads of kernel is 0, 1 to 1024 are allowed"),
        ((1, 1, 1), 1025, 0, "threads of kernel is 1025"),
        ((1, 1, 1), 32, MOST_SHARED_BYTES + 1, "shared_bytes of kernel is 101377, 0 to 101376 are allowed"),
    ],
)
def test_a_shape_that_no_gpu_takes_is_refused_everywhere(
    grid: Any, threads: int, shared_bytes: int, message: str
) -> None:
    with use_runner(Recorder()), pytest.raises(ValueError, match=message):
        launch("unit", "kernel", Params(), grid, threads, shared_bytes, torch.empty(1))


# Where they can run ---------------------------------------------------------------------------------------------------


class Recorder:
    """A runner that keeps what it is given."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __call__(self, *launch: Any) -> None:
        self.launches.append(launch)


def test_on_the_cpu_launches_go_to_the_runner_within_its_context() -> None:
    recorder, params = Recorder(), Params(n=3)
    with use_runner(recorder):
        assert cuda_obstacle(CPU) is None
        launch("unit", "kernel", params, (1, 2, 3), 64, 16, torch.empty(1))
        with use_runner(None):
            assert cuda_obstacle(CPU) is not None
    assert recorder.launches == [("unit", "kernel", params, (1, 2, 3), 64, 16)]
    with use_runner(None):
        with pytest.raises(
            RuntimeError, match=r"kernel kernel of unit cannot run on cpu: .*need a GPU.*pass backend='reference'"
        ):
            launch("unit", "kernel", params, (1, 1, 1), 64, 0, torch.empty(1))
        with pytest.raises(RuntimeError, match="the tensors are on meta"):
            launch("unit", "kernel", params, (1, 1, 1), 64, 0, torch.empty(1, device="meta"))


def test_a_gpu_with_code_has_no_obstacle(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "first", lambda stem, capability, version: f"{stem}.sm_90a.cubin")
    assert cuda_obstacle(CUDA) is None
    found = status.examine()
    assert found["driver"] == {"found": "13.0", "why": None}
    assert found["code"][0]["stems"]["rmsnorm_quantize"] == "rmsnorm_quantize.sm_90a.cubin"
    assert "rmsnorm_quantize.sm_90a.cubin" in status.summary(found)


def test_obstacles_of_a_gpu(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "sees no CUDA device" in str(cuda_obstacle(CUDA))
    fake.fails["cuDriverGetVersion"] = Result.CUDA_ERROR_INVALID_VALUE
    assert "cuDriverGetVersion: CUDA_ERROR_INVALID_VALUE" in str(cuda_obstacle(CUDA))

    def absent() -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(fake, "cuDriverGetVersion", absent, raising=False)
    assert cuda_obstacle(CUDA) == "no NVIDIA driver is found (Failed to dlopen libcuda.so.1)"
    assert status.examine()["obstacle"] == cuda_obstacle(CUDA)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert "cuda-bindings is not installed" in str(cuda_obstacle(CUDA))
    with pytest.raises(CudaError, match="cuda-bindings is not installed"):
        on_gpu()


def test_a_gpu_whose_code_cannot_be_had_says_why(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(stem: str, *_: object) -> str:
        raise CudaError(f"no code for {stem}: a reason")

    monkeypatch.setattr(images, "first", none)
    assert ": a reason" in str(cuda_obstacle(CUDA))
    found = status.examine()
    assert set(found["code"][0]["stems"].values()) == {
        f"none: no code for {s}: a reason" for s in found["code"][0]["stems"]
    }
    assert status.summary(found) == found["obstacle"]


def test_importing_the_ops_loads_no_cuda_package() -> None:
    """Beyond what torch itself loads where it finds them."""
    loaded = "[name for name in sys.modules if name.partition('.')[0] == 'cuda']"
    module = "happyhorse_fast.ops.runtime.cuda.launch"
    code = f"import sys, torch; before = {loaded}; import {module}; print({loaded} == before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
