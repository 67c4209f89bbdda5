"""The table of `make bench`, printed after pytest-benchmark's own."""

from __future__ import annotations

import bench.bootstrap  # noqa: F401  isort: skip - first: maps the kernels

from typing import Any

import pytest

from bench import ops

BENCH = pytest.StashKey[ops.Bench]()
ENTRIES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print every entry of this run."""
    if ENTRIES in config.stash:
        entries = config.stash[ENTRIES]
        terminalreporter.section("ops")
        terminalreporter.write_line(ops.summary(config.stash[BENCH], entries))
