"""Importing the package is quick, and loads no optional or heavy module before it is needed."""

import importlib.util
import json
import subprocess
import sys

import pytest

# Optional, slow to import, or both. torch is imported first, so what it loads by itself is not counted.
HEAVY = ["PIL", "av", "diffusers", "matplotlib", "pytest", "rich", "triton", "typer"]
PROBE = """
import importlib, json, sys, time
for name in {blocked}:
    sys.modules[name] = None
import torch
before = set(sys.modules)
start = time.perf_counter()
for name in {modules}:
    importlib.import_module(name)
import happyhorse_fast as hh
missing = [name for name in hh.__all__ if not hasattr(hh, name)]
seconds = time.perf_counter() - start
loaded = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({heavy}))
print(json.dumps({{"seconds": seconds, "loaded": loaded, "missing": missing}}))
"""


def probe(modules: list[str], blocked: tuple[str, ...] = ()) -> dict:
    """Import ``modules`` and every public name in a fresh interpreter."""
    code = PROBE.format(modules=modules, blocked=blocked, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def modules() -> list[str]:
    optional = [f"happyhorse_fast.{name}" for name in ("ops",)]
    return ["happyhorse_fast", *(name for name in optional if importlib.util.find_spec(name))]


@pytest.fixture(scope="module")
def imported() -> dict:
    return probe(modules())


def test_import_and_public_names_load_nothing_heavy(imported):
    assert imported["loaded"] == []
    assert imported["missing"] == []


def test_what_the_public_functions_raise_and_take_is_public():
    import happyhorse_fast as hh

    assert issubclass(hh.BackendError, RuntimeError)
    assert issubclass(hh.CheckpointError, Exception) and issubclass(hh.NonFiniteError, Exception)
    assert hh.Layout(frames=2, frame_tokens=4, audio=1, text=1).slots == 10
    assert "Explanation" in dir(hh)


def test_import_takes_less_than_two_seconds_after_torch(imported):
    seconds = imported["seconds"] if imported["seconds"] < 2 else probe(modules())["seconds"]  # the machine was busy
    assert seconds < 2, f"{seconds:.2f} s"


@pytest.mark.parametrize("blocked", [("triton",), tuple(HEAVY)])
def test_import_works_without_optional_packages(blocked):
    assert probe(modules(), blocked)["missing"] == []


def test_the_probe_sees_a_heavy_module():
    assert probe(["rich"])["loaded"] == ["rich"]
