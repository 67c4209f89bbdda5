"""A benchmark of the reference on the CPU, whose ceilings nobody measures."""

import pytest
from comparison_cases import CEILINGS, CPU, EAGER

from bench.measure.comparison import Bench


@pytest.fixture
def ceilings(monkeypatch):
    """Not measured for every test anew."""
    monkeypatch.setattr(Bench, "measured", CEILINGS)


@pytest.fixture
def bench():
    return Bench(CPU, "reference", seconds=0.0, peers=[EAGER])
