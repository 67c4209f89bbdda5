"""A pytest plugin for tests on a GPU: why one failed is printed at once, and a lost GPU ends its process.

A run may be cut before pytest prints tracebacks at its end. And after an illegal address every later test of a process
would fail: a worker ends there, which pytest-xdist replaces for the rest; without workers the run ends and says so.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from bench import LOST
from happyhorse_fast.ops.runtime.obstacles import lost

MOST_CHARACTERS = 4000


class Gpu:
    """State of one test process.

    Args:
        config: pytest's.
        device: Where tests run.
    """

    def __init__(self, config: pytest.Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.worker = hasattr(config, "workerinput")
        self.runs_tests = self.worker or not config.getoption("numprocesses", None)
        self._failed = False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print a failure's end."""
        if not report.failed:
            return
        self._failed = True
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and not self.worker:
            terminal.write_line(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext[-MOST_CHARACTERS:]}")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """End the process whose GPU is lost."""
        if not self._failed or not self.runs_tests:
            return
        self._failed = False
        reason = lost(self.device)
        if reason and self.worker:
            os._exit(LOST)
        if reason:
            pytest.exit(f"STOPPED: the GPU of this process is lost after {nodeid}: {reason}", returncode=LOST)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """A kind of kernel that has no test on this GPU is no failure."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    """Install it where there is a GPU, or none is needed."""
    config.pluginmanager.register(Gpu(config, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
