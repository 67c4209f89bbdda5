"""Importing the package is quick, and loads no optional or heavy module before it is needed."""

import importlib.util
import json
import pkgutil
import re
import subprocess
import sys

import pytest

from happyhorse_fast import moved

# Optional, slow to import, or both. torch is imported first, so what it loads by itself is not counted.
HEAVY = ["PIL", "av", "diffusers", "matplotlib", "pytest", "rich", "transformers", "triton", "typer"]
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


def test_an_op_without_triton_says_what_is_missing_and_what_runs():
    code = """
import sys
sys.modules["triton"] = None
import torch
from happyhorse_fast import ops
x = torch.ones(2, 64, dtype=torch.bfloat16)
codes, _ = ops.quantize_rows(x, False, backend="reference")
assert (codes == 127).all()
ops.quantize_rows(x, False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    wanted = "backend 'triton' needs Triton, which is not installed; 'reference' runs in plain torch"
    assert (done.returncode, last) == (1, f"ImportError: {wanted}")


def test_the_ops_are_functions_of_one_module_that_loads_on_first_use():
    from happyhorse_fast import ops

    folders = {info.name for info in pkgutil.iter_modules(ops.__path__)}
    assert not folders & set(ops.__all__), "an import of one would hide the other"
    assert dir(ops) == ops.__all__
    for name in ops.__all__:
        assert callable(getattr(ops, name)) and getattr(ops, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'fp8_linaer'"):
        _ = ops.fp8_linaer


@pytest.mark.parametrize("path", moved.MOVED)
def test_an_old_path_names_the_new_one(path):
    with pytest.raises(ImportError, match=re.escape(f"{path} moved: {moved.MOVED[path]}")):
        importlib.import_module(path)
    parent, _, name = path.rpartition(".")
    for line in re.findall(r"from happyhorse_fast[.\w]* import [\w, ]+", moved.MOVED[path]):
        exec(line, {})
    if not hasattr(importlib.import_module(parent), name):
        with pytest.raises(ImportError, match=" moved: "):
            exec(f"from {parent} import {name}", {})
    with pytest.raises(ImportError, match=" moved: "):
        importlib.import_module(f"{path}.part")
    assert importlib.util.find_spec("happyhorse_fast.no_such_module") is None


def test_the_probe_sees_a_heavy_module():
    assert probe(["rich"])["loaded"] == ["rich"]
