"""The wheel holds the whole package, the device code under its mapped name, and is built without torch."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import happyhorse_fast

ROOT = Path(__file__).parents[1]
INGREDIENTS = ["LICENSE", "README.md", "happyhorse_fast", "kernels", "pyproject.toml", "setup.py"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy of what a build needs, so that no stale build folder of the checkout can hide a gap."""
    work = tmp_path_factory.mktemp("wheel")
    for name in INGREDIENTS:
        source, target = ROOT / name, work / "source" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    (work / "poison").mkdir()
    (work / "poison" / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", work, work / "source"],
        env=os.environ | {"PYTHONPATH": str(work / "poison")},
        check=True,
    )
    (path,) = work.glob("*.whl")
    return zipfile.ZipFile(path)


def test_top_level_is_the_package_alone(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"happyhorse_fast"}


def test_every_source_and_data_file_is_in_the_wheel(wheel):
    expected = {"happyhorse_fast/kernels/__init__.py"}
    for folder, prefix in (("happyhorse_fast", "happyhorse_fast"), ("kernels", "happyhorse_fast/kernels")):
        files = (p for end in ("py", "json", "safetensors") for p in (ROOT / folder).rglob(f"*.{end}"))
        expected |= {f"{prefix}/{p.relative_to(ROOT / folder).as_posix()}" for p in files}
    assert expected - set(wheel.namelist()) == set()


def test_metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Version"] == happyhorse_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r)[0] for r in core} == {"numpy", "rich", "safetensors", "torch", "typer"}


def test_an_unpacked_wheel_imports_the_device_code(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import happyhorse_fast as a, happyhorse_fast.kernels as b; print(a.__file__, b.__file__, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(Path(line).is_relative_to(tmp_path) for line in done.stdout.splitlines()), done.stdout


def test_a_build_requires_setuptools_alone():
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = \[(.*?)\]", text, flags=re.MULTILINE)
    assert re.fullmatch(r'"setuptools[><=\d.]*"', requires)
