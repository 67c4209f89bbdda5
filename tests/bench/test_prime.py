"""Kernels compiled ahead of a GPU run, without a GPU: the launches it makes find them all, after the file was moved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench.bootstrap import PRIMED_VARIABLE, ROOT
from bench.gpu import __main__ as gpu
from bench.prime import file as primed
from happyhorse_fast.ops.runtime.formats import VARIANTS

# Three ops of one tiny layer, five kernels, and the Hopper kernel; with a flag the plain one is launched beside it.
SOME = "^case (rmsnorm_quantize|qkv_linear|select_blocks-25%)/tiny/bf16 triton$"
INT8 = "^case (fp8_linear.*|qkv_linear|rmsnorm_quantize|quantize_rows.*)/tiny/int8 triton$"
HOPPER = "^case (block_sparse_attention-dense/tiny/(bf16|int8_qk)|attention-dense/tiny/bf16) hopper$"

# What a GPU run does, but for the launch itself: Triton's JIT specialises and looks, and compiles what is not there.
JIT = """
import json, os, re, sys
from unittest import mock

import bench.bootstrap
import torch, triton
from triton.compiler import CompiledKernel

from bench.aot.recording import Driver
from bench.prime.launches import sources
from bench.prime.stand_in import stand_in

os.environ |= {"TRITON_INTERPRET": "0", "HAPPYHORSE_FAST_GPU_TESTS": "recorded"}
Driver(90).activate()
looked = []
triton.knobs.compilation.listener = lambda *, cache_hit, metadata, **_: looked.append((metadata["name"], cache_hit))
never = mock.patch.multiple(CompiledKernel, run=lambda *_: None, launch_metadata=lambda *_: None)
with never, stand_in(90):
    for name, launch in sources(90):
        if re.search(sys.argv[1], name):
            launch()
print(json.dumps(looked))
"""


def run(*command: str, **environment: str) -> str:
    """In a process whose Triton compiles: this one interprets."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def prime(only: str, into: Path) -> Path:
    run("-m", "bench.prime", "--jobs", "1", "--only", only, "--into", str(into))
    (packed,) = into.iterdir()
    return packed


def launched(only: str, cache: Path) -> list[tuple[str, bool]]:
    """(kernel, whether it was there) of every launch that the JIT has not specialised before."""
    return [
        tuple(found)
        for found in json.loads(
            run("-c", JIT, only, TRITON_CACHE_DIR=str(cache), **{PRIMED_VARIABLE: "1"}).splitlines()[-1]
        )
    ]


@pytest.mark.slow
def test_after_it_was_moved_a_primed_cache_holds_every_launch(tmp_path):
    packed = prime(f"{SOME}|{HOPPER}|{INT8}", tmp_path / "here")
    moved = tmp_path / "there" / packed.name
    moved.parent.mkdir()
    shutil.move(packed, moved)
    cache = primed.unpack(moved)
    before = sorted(path.name for path in cache.iterdir())
    assert primed.kernels(cache) == len(before)
    looked = launched(f"{SOME}|{HOPPER}|{INT8}", cache)
    assert [name for name, there in looked if not there] == []
    assert sorted(path.name for path in cache.iterdir()) == before, "nothing was compiled"
    names = [name for name, _ in looked]
    assert names.count("block_sparse_attention_hopper_kernel") == 3, "bf16, int8_qk, bf16 with a flag"
    for name in (
        "rmsnorm_quantize",
        "qkv_linear",
        "pool_blocks",
        "select_blocks",
        "order_rows",
        "block_sparse_attention_hopper",
        "block_sparse_attention",
        "fp8_linear",
        "quantize_rows",
    ):
        assert f"{name}_kernel" in names


LATER = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("fast fp8 linear", "fast fp8 int8_qk")]


@pytest.mark.parametrize("mode", ["fast int8", *LATER])
def test_what_a_clips_layers_launch_is_primed(mode):
    # With 40 heads, one map and, of e4m3 products, e4m3 out: no case, table or self-check makes this launch.
    only = f"^clip happyhorse-1.0-15b/1080p/{mode}/exact/whole$"
    code = "import sys; from bench.prime.launches import found; print(*(x.name for x in found(90, sys.argv[1])))"
    found = run("-c", code, only).split()
    assert found.count("block_sparse_attention_hopper_kernel") == 1
    assert "block_sparse_attention_kernel" not in found, "a known bound needs no other form"
    for op in ("fp8_linear_residual", "fp8_linear_activation"):
        assert f"{op}_beside_kernel" in found, "what the table asks for"
    assert "fp8_linear_kernel" not in found
    widths = 3 if mode == "fast int8" else 0
    assert found.count("quantize_rows_kernel") == widths, "for proj, and for down after SwiGLU7 and after GELU7"


def test_what_the_self_check_launches_on_hopper_is_primed():
    code = """
import collections, contextlib, json
from bench.prime.launches import found
from happyhorse_fast.ops.runtime.triton import device
launches = found(90, "^self-check$")
device.few_programs = contextlib.nullcontext
assert launches == found(90, "^self-check$"), "no kernel is compiled for a grid"
qkv = [json.loads(x.specialised) for x in launches if x.name == "qkv_linear_kernel"]
print(sorted((x["constant_vals"][1], x["signature"]["x"].startswith("tensordesc")) for x in qkv))
"""
    formats = len(VARIANTS["triton"]["qkv_linear"])
    # The plain kernel: with heads of 64, with heads of 128 where Hopper's is not asked for, and through pointers.
    wanted = [(64, True)] * formats + [(128, False)] * formats + [(128, True)] * formats
    assert run("-c", code).splitlines()[-1] == str(wanted)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return prime(SOME, tmp_path_factory.mktemp("primed"))


@pytest.mark.slow
def test_without_its_paths_put_right_a_moved_cache_holds_nothing(packed, tmp_path, monkeypatch):
    # What relocating is for.
    moved = Path(shutil.copy(packed, tmp_path))
    monkeypatch.setattr(primed, "relocate", lambda folder: None)
    cache = primed.unpack(moved)
    looked = launched(SOME, cache)
    assert looked and not any(there for _, there in looked)


@pytest.mark.parametrize("settled", [True, False])
def test_a_kernels_key_does_not_depend_on_what_ran_before_it(settled):
    # Before Triton 3.8 it does, unless settled: a run that launches in another order than priming would compile again.
    code = """
import sys
import bench.bootstrap
from happyhorse_fast.kernels.linear import fp8_linear_kernel as other
from happyhorse_fast.kernels.qkv import qkv_linear_kernel as kernel
print([x.cache_key for x in ((other, kernel) if sys.argv[1:] else (kernel,))][-1])
"""
    environment = {PRIMED_VARIABLE: "1"} if settled else {}
    same = run("-c", code, **environment) == run("-c", code, "other first", **environment)
    assert same is (settled or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8))


@pytest.mark.slow
def test_a_cache_is_unpacked_once_and_again_where_its_file_is_newer(packed, tmp_path):
    moved = Path(shutil.copy(packed, tmp_path))
    cache = primed.unpack(moved)
    planted = cache / "planted"
    planted.mkdir()
    assert primed.unpack(moved) == cache and planted.is_dir(), "what a run compiled beside it is kept"
    later = cache.stat().st_mtime + 10
    os.utime(moved, (later, later))
    assert primed.unpack(moved) == cache and not planted.exists()


# The build of Triton that will look -----------------------------------------------------------------------------------


def test_the_key_of_another_build_is_found_without_running_it(tmp_path):
    folder, installed = tmp_path / "other" / "triton", Path(triton.__file__).parent
    shutil.copytree(installed, folder, ignore=shutil.ignore_patterns("*.so", "bin", "__pycache__"))
    library = folder / "_C" / "libtriton.so"
    library.symlink_to(installed / "_C" / library.name)
    assert primed.version_key(folder.parent) == primed.version_key()
    library.unlink()
    library.write_bytes(b"built for another Python")
    assert primed.version_key(folder.parent) != primed.version_key()
    init = folder / "__init__.py"
    init.write_text(init.read_text().replace(triton.__version__, "3.0.0"))
    with pytest.raises(ValueError, match=r"build must hold Triton .*; .* holds 3\.0\.0"):
        primed.version_key(folder.parent)


@pytest.mark.slow
def test_a_run_finds_what_was_primed_for_its_gpu_and_its_triton_alone(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(gpu.CACHE_VARIABLE, raising=False)
    Path(shutil.copy(packed, tmp_path))
    own = primed.version_key()
    for key, arch, there in ((own, "90", True), ("other", "90", False), (own, "100", False)):
        monkeypatch.setattr(primed, "version_key", lambda key=key: key)
        with gpu.primed_kernels(tmp_path, arch, tmp_path / "logs"):
            assert (os.environ.get(gpu.CACHE_VARIABLE) == str(tmp_path / packed.stem)) is there
            if there:  # a kernel that no source names
                (tmp_path / packed.stem / "more").mkdir()
                (tmp_path / packed.stem / "more" / "__grp__more.json").write_text('{"child_paths": {}}')
        said = capsys.readouterr().out
        assert gpu.CACHE_VARIABLE not in os.environ
        assert ("1 kernels compiled beside the 5" in said) is there
        assert ("no kernels are primed for sm_" in said) is not there
    assert (tmp_path / "logs" / gpu.KEY).read_text() == f"{own}\n", "for the next time"
    with gpu.primed_kernels(tmp_path, None, tmp_path / "none"):
        assert gpu.CACHE_VARIABLE not in os.environ
    monkeypatch.setenv(gpu.CACHE_VARIABLE, "mine")
    with gpu.primed_kernels(tmp_path, "90", tmp_path / "none"):
        assert os.environ[gpu.CACHE_VARIABLE] == "mine"
