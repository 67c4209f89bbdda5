"""The plugin of the GPU tests: a failure is explained at once, and a lost GPU blames only the test that lost it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import LOST
from bench.bootstrap import ROOT
from bench.gpu.pytest_plugin import Gpu

# `crash` stands for an illegal address: everything after it fails in the same process.
PLANTED = """
import os, pytest
import bench.gpu.pytest_plugin

LOST = []
bench.gpu.pytest_plugin.lost = lambda device: LOST[0] if LOST else None

def crash():
    LOST.append("CUDA error: an illegal memory access was encountered")
    raise RuntimeError(LOST[0])

def test_wrong():
    assert "measured" == "allowed"

@pytest.mark.parametrize("number", range(12))
def test_kernel(number):
    if LOST:
        raise RuntimeError("blamed: " + LOST[0])
    if number == 3:
        crash()
"""


def run(tmp_path, *arguments):
    (tmp_path / "test_planted.py").write_text(PLANTED)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        "pytest",
        "-p",
        "bench.gpu.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "-v",
        "--benchmark-disable",
        "--tb=short",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command, *arguments, "test_planted.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    return done.returncode, done.stdout


def test_without_workers_the_run_ends_and_says_so(tmp_path):
    code, out = run(tmp_path, "-p", "no:xdist")
    assert code == LOST, out
    assert "STOPPED: the GPU of this process is lost after test_planted.py::test_kernel[3]" in out
    assert "blamed" not in out
    before_the_end = out[: out.index("test_kernel[0]")]
    assert "'measured' == 'allowed'" in before_the_end, "a cut run shows why as well"


def test_no_test_of_a_kind_is_no_failure(pytestconfig):
    session = SimpleNamespace(exitstatus=pytest.ExitCode.NO_TESTS_COLLECTED)
    Gpu(pytestconfig, torch.device("cpu")).pytest_sessionfinish(session, session.exitstatus)
    assert session.exitstatus == 0
    session = SimpleNamespace(exitstatus=pytest.ExitCode.TESTS_FAILED)
    Gpu(pytestconfig, torch.device("cpu")).pytest_sessionfinish(session, session.exitstatus)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED


@pytest.mark.slow  # 3 s: it imports torch
def test_a_run_without_a_test_of_a_kind_does_not_fail(tmp_path):
    code, out = run(tmp_path, "-p", "no:xdist", "-k", "hopper")
    assert code == 0 and "13 deselected" in out, out


@pytest.mark.slow  # 30 s: workers import torch
def test_a_worker_that_lost_the_gpu_is_replaced(tmp_path):
    code, out = run(tmp_path, "-n", "2", "--dist", "worksteal")
    assert code == 1, out
    assert len(set(re.findall(r"PASSED (\S+)", out))) == 11 and "blamed" not in out, out
    assert "illegal memory access" in out
