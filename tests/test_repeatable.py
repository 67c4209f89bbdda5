"""Two runs of the tests are the same tests with the same examples, whatever ran before them."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]


def drawn() -> list[object]:
    """What one test draws."""
    seen: list[object] = []

    @settings(settings.get_profile("repeatable"), max_examples=200)
    @given(st.integers(), st.text(), st.floats())
    def test(whole: int, text: str, real: float) -> None:
        seen.append(repr((whole, text, real)))

    test()
    return seen


def test_examples_depend_neither_on_modules_nor_on_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn()
    # As shipped, Hypothesis draws one in twenty values from the constants of the modules that are imported by then.
    constants = [*range(10**9, 10**9 + 99), *(f"constant {i}" for i in range(99)), *(i + 0.123 for i in range(99))]
    (tmp_path / "of_another.py").write_text(f"CONSTANTS = {constants!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_another")
    random.seed(1)
    assert drawn() == first


@pytest.mark.parametrize("number", range(2))
def test_every_test_starts_with_the_same_random_numbers(number: int) -> None:
    torch_is = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), torch_is)
    assert random.random() == random.Random(0).random()
    assert np.random.random() == np.random.RandomState(0).random()  # noqa: NPY002


def test_the_fuzz_profile_draws_twenty_times_as_many_from_a_fresh_seed() -> None:
    before = settings.get_current_profile_name()
    try:
        settings.load_profile("repeatable")
        assert examples(7).max_examples == 7 and settings().derandomize
        settings.load_profile("fuzz")
        assert examples(7).max_examples == 140 and not settings().derandomize
    finally:
        settings.load_profile(before)


RECORDER = """
import atexit, hashlib, json, os
from hypothesis.internal.observability import add_observability_callback

drawn = {}

def note(case):
    if case.type == "test_case":
        drawn.setdefault(case.property, []).append(case.representation)

def pytest_sessionstart():
    add_observability_callback(note)

def pytest_collection_finish(session):
    drawn["collected"] = [item.nodeid for item in session.items]

atexit.register(lambda: json.dump(drawn, open(os.environ["DRAWN"], "w")))
"""


def recorded(folder: Path, hash_seed: int, *arguments: str) -> dict[str, list[str]]:
    """What a run of pytest collects, and draws for each property."""
    (folder / "recorder.py").write_text(RECORDER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONHASHSEED": str(hash_seed), "DRAWN": str(folder / "drawn.json")}
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "recorder"]
    command += ["-p", "no:xdist", "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "drawn.json").read_text())


@pytest.mark.slow  # 20 s
def test_two_runs_draw_the_same(tmp_path: Path) -> None:
    names = "test_config fast/test_padded_rows block_map/test_block_map block_map/test_host_module sampler/test_sampler"
    files = [str(ROOT / "tests" / f"{name}.py") for name in names.split()]
    first = recorded(tmp_path, 1, "-m", "hypothesis", *files)
    again = recorded(tmp_path, 2, "-m", "hypothesis", *reversed(files))
    assert sorted(first.pop("collected")) == sorted(again.pop("collected"))
    assert len(first) == 7 and sum(map(len, first.values())) > 400
    assert again == first


@pytest.mark.slow  # 20 s
def test_two_runs_collect_the_same(tmp_path: Path) -> None:
    first, again = (recorded(tmp_path, seed, "--collect-only", str(ROOT / "tests"))["collected"] for seed in (1, 2))
    assert len(first) > 2000
    assert again == first
