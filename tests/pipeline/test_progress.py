"""Time that is left over all stages, and which parts stay on the device."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from happyhorse_fast.pipeline import progress
from happyhorse_fast.pipeline.progress import Monitor, Prediction, StageInfo
from happyhorse_fast.pipeline.residency import Residency

CPU = torch.device("cpu")


class Clock:
    """Stands for time.perf_counter."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", made)
    return made


def test_the_time_left_follows_what_was_measured(clock: Clock) -> None:
    infos: list[StageInfo] = []
    work = {"a": Prediction(load=1, compute=2), "b": Prediction(load=3, compute=10)}
    monitor = Monitor(CPU, work, infos.append, shown=False)
    assert monitor.seconds_left() is None
    with monitor.stage("a"):
        clock.now += 2  # twice the prediction
        monitor.loaded()
        clock.now += 3  # and three times, for half of the work
        monitor.step(1, 2)
        clock.now += 3
        monitor.step(2, 2)
    with monitor.stage("b"):
        clock.now += 12
        monitor.loaded()
        monitor.step(0, 5)
    assert [info.seconds_left for info in infos] == pytest.approx([3 + 2 * 3 + 3 * 10, 2 * 3 + 3 * 10, 3 * 10])
    assert [(cost.stage, cost.seconds, cost.load_seconds) for cost in monitor.costs] == [("a", 8, 2), ("b", 12, 12)]
    assert all(cost.peak_bytes for cost in monitor.costs)
    assert infos[0].seconds == 5 and "tensor(" not in repr(infos[0])


def test_a_stage_that_fails_has_no_cost() -> None:
    monitor = Monitor(CPU, {"a": Prediction(1, 1)}, None, shown=False)
    with pytest.raises(KeyboardInterrupt), monitor.stage("a"):
        raise KeyboardInterrupt
    assert monitor.costs == []


def test_the_bar_names_the_stage_and_ends_with_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(CPU, {"denoise": Prediction(0, 1)}, None, shown=True)
    with monitor.display(), monitor.stage("denoise"):
        time.sleep(0.01)
        monitor.step(3, 8)
    shown = capsys.readouterr().err
    assert "denoise 3/8" in shown and "left" in shown


@pytest.mark.parametrize("keep", [True, False])
def test_parts_stay_or_make_room(keep: bool) -> None:
    loads: list[str] = []

    def load(name: str) -> Any:
        loads.append(name)
        return object()

    parts = Residency(CPU, keep)
    for name in ("a", "b", "a"):
        with parts.using(name, lambda name=name: load(name)):
            assert parts.held == (("a", "b")[: len(loads)] if keep else (name,))
    assert loads == (["a", "b"] if keep else ["a", "b", "a"])
    assert parts.held == (("a", "b") if keep else ())
    parts.keep_only({"b", "c"})
    assert parts.held == (("b",) if keep else ())
    parts.free()
    assert parts.held == ()


def test_a_part_that_fails_is_not_held_where_one_is_there_at_a_time() -> None:
    parts = Residency(CPU, keep=False)
    with pytest.raises(RuntimeError), parts.using("a", object):
        raise RuntimeError
    assert parts.held == ()
