"""The table of `make bench`, printed after pytest-benchmark's own."""

from __future__ import annotations

import bench.bootstrap  # noqa: F401  isort: skip - first: maps the kernels

from typing import Any

import pytest

from bench.measure.comparison import Bench
from bench.ops_table import summary

BENCH = pytest.StashKey[Bench]()
ENTRIES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print every entry of this run."""
    if ENTRIES in config.stash:
        entries, bench = config.stash[ENTRIES], config.stash[BENCH]
        terminalreporter.section("ops")
        terminalreporter.write_line(summary(bench.peaks, bench.measured, bench.absent, entries))
