"""Wheels: whole, built without torch, with what the machine has; installed and used with neither nvcc nor torch."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import happyhorse_fast
from happyhorse_fast.csrc import native, sources

ROOT = Path(__file__).parents[1]
INGREDIENTS = ["LICENSE", "README.md", "csrc", "happyhorse_fast", "kernels", "pyproject.toml", "setup.py"]
BUILT = shutil.ignore_patterns("__pycache__", "_C*.so", "cubins")
SITE_PACKAGES = sysconfig.get_path("purelib")
MODULE = "happyhorse_fast/_C" + sysconfig.get_config_var("EXT_SUFFIX")

pytestmark = pytest.mark.slow


def copy_of_the_checkout(folder: Path) -> Path:
    """What a build needs and nothing built, so that no stale file of the checkout can hide a gap."""
    for name in INGREDIENTS:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=BUILT)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    # Stale ones that a build must not pick up.
    (folder / "happyhorse_fast" / "cubins").mkdir()
    (folder / "happyhorse_fast" / "cubins" / "manifest.json").write_text("stale")
    return folder


def build(work: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """A wheel and what its build said."""
    source = copy_of_the_checkout(work / "source")
    (work / "poison").mkdir()
    (work / "poison" / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", work, source]
    environment = {**os.environ, "PYTHONPATH": str(work / "poison"), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (path,) = work.glob("*.whl")
    return zipfile.ZipFile(path), done.stdout + done.stderr


def without_nvcc() -> dict[str, str]:
    """An environment where no folder of the PATH has nvcc; the compiler and ninja are elsewhere."""
    folders = [path for path in os.environ["PATH"].split(os.pathsep) if not shutil.which("nvcc", path=path)]
    return {"PATH": os.pathsep.join(folders), "CUDA_HOME": "", "CUDA_PATH": ""}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    return build(tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Of a machine without nvcc."""
    found, said = build(tmp_path_factory.mktemp("plain"), **without_nvcc())
    assert "no nvcc on the PATH or in CUDA_HOME, so no CUDA binaries are built" in said
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory, plain_wheel) -> Path:
    """A fresh virtual environment with the plain wheel, and of all other packages numpy and NVRTC alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", plain_wheel.filename], check=True)
    site = Path(run(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for name in ("numpy", "numpy.libs", "cuda", "nvidia"):
        if (Path(SITE_PACKAGES) / name).exists():
            (site / name).symlink_to(Path(SITE_PACKAGES) / name)
    return folder


def run(python: Path, code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], env=kept | environment, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What is in it --------------------------------------------------------------------------------------------------------


def test_top_level_is_the_package_alone(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"happyhorse_fast"}


def test_every_source_and_data_file_is_in_the_wheel_and_no_host_code(wheel):
    expected = {"happyhorse_fast/kernels/__init__.py", "happyhorse_fast/csrc/__init__.py", "happyhorse_fast/py.typed"}
    for folder, prefix in (("happyhorse_fast", ""), ("kernels", "/kernels"), ("csrc", "/csrc")):
        files = (p for end in ("py", "json", "safetensors", "cu", "cuh") for p in (ROOT / folder).rglob(f"*.{end}"))
        expected |= {f"happyhorse_fast{prefix}/{p.relative_to(ROOT / folder).as_posix()}" for p in files}
    expected = {name for name in expected if "/cubins/" not in name}
    assert expected - set(wheel.namelist()) == set()
    assert [name for name in wheel.namelist() if name.endswith((".cpp", ".hpp"))] == []


def test_metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Version"] == happyhorse_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r)[0] for r in core} == {"numpy", "rich", "safetensors", "torch", "typer"}


def test_a_build_requires_neither_torch_nor_a_cuda_package():
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = \[(.*?)\]", text, flags=re.MULTILINE)
    assert set(re.findall(r'"([\w-]+)', requires)) == {"setuptools", "pybind11", "ninja"}


def test_the_host_module_needs_no_library_but_those_of_the_system(wheel, tmp_path):
    assert MODULE in wheel.namelist()
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run(["readelf", "-d", wheel.extract(MODULE, tmp_path)], capture_output=True, text=True).stdout
    needed = {re.match(r"[a-z+_-]+", name)[0] for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic)}
    assert needed <= {"libstdc++", "libgcc_s", "libc", "libm", "ld-linux-x"}, needed


@pytest.mark.skipif(native.nvcc() is None, reason="no nvcc on the PATH or in CUDA_HOME")
def test_a_machine_with_nvcc_builds_a_binary_per_unit_and_architecture(wheel):
    manifest = json.loads(wheel.read("happyhorse_fast/cubins/manifest.json"))
    assert list(manifest["stems"]) == sources.stems()
    listed = {"manifest.json"}
    for stem, entry in manifest["stems"].items():
        assert entry["sources"] == sources.digest(stem)
        assert list(entry["binaries"]) == [*sources.ARCHITECTURES]
        for target, sha256 in entry["binaries"].items():
            listed.add(f"{stem}.{target}.cubin")
            content = wheel.read(f"happyhorse_fast/cubins/{stem}.{target}.cubin")
            assert hashlib.sha256(content).hexdigest() == sha256
    prefix = "happyhorse_fast/cubins/"
    assert {n.removeprefix(prefix) for n in wheel.namelist() if n.startswith(prefix)} == listed


# What is absent -------------------------------------------------------------------------------------------------------


def test_a_machine_without_nvcc_builds_the_host_module_and_no_binaries(plain_wheel):
    assert MODULE in plain_wheel.namelist()
    cubins = [name for name in plain_wheel.namelist() if "/cubins/" in name]
    assert cubins == ["happyhorse_fast/cubins/manifest.json"]
    assert json.loads(plain_wheel.read(cubins[0]))["nvcc"] is None


def test_a_machine_without_a_compiler_builds_a_wheel_without_the_host_module(tmp_path):
    found, said = build(tmp_path, CXX="no-such-compiler")
    assert "no C++ compiler found" in said
    assert Path(found.filename).name.endswith("-py3-none-any.whl")
    assert [name for name in found.namelist() if "_C." in name or "/cubins/" in name] == ["happyhorse_fast/_C.pyi"]
    assert "happyhorse_fast/csrc/device/platform.cuh" in found.namelist()


# Installed ------------------------------------------------------------------------------------------------------------


def test_without_torch_the_host_module_and_the_device_code_work(environment):
    code = """
import importlib.util, numpy, happyhorse_fast._C as host
from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda import binaries, nvrtc
assert importlib.util.find_spec("torch") is None
ranges = numpy.array([[0, 300]])
print(len(host.from_ranges(ranges, ranges, 300, 300)), len(sources.stems()))
print(nvrtc.compile("rmsnorm_quantize", "sm_90a")[1:4])
print(binaries.usable("rmsnorm_quantize", (9, 0), 13000)[1])
"""
    said = run(environment / "bin" / "python", code).splitlines()
    assert said == [f"6 {len(sources.stems())}", "b'ELF'", "no binaries were built: there was no nvcc"]


def test_with_the_torch_of_the_tests_the_installed_package_works(environment):
    """From the installed wheel, with the packages of this environment after its own."""
    python, path = environment / "bin" / "python", {"PYTHONPATH": SITE_PACKAGES}
    code = "import torch, happyhorse_fast.kernels as k, happyhorse_fast.csrc as c; print(k.__file__, c.__file__)"
    assert all(Path(file).is_relative_to(environment) for file in run(python, code, **path).split())
    program = "import runpy; runpy.run_module('happyhorse_fast', run_name='__main__')"
    main = f"import sys; sys.argv[1:] = ['doctor', '--json']; {program}"
    data = json.loads(run(python, main, **path))
    assert Path(data["cuda"]["host_module"]["found"]).is_relative_to(environment)
    assert data["cuda"]["binaries"] == {"found": None, "why": "no binaries were built: there was no nvcc"}
    assert data["cuda"]["nvrtc"]["why"] is None
