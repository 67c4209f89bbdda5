"""Time that is left over all stages."""

from __future__ import annotations

import time

import pytest
import torch

from happyhorse_fast.pipeline import progress
from happyhorse_fast.pipeline.progress import Monitor, Prediction, StageInfo

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
