"""A GPU in simulated time: a queue between host and device, and a clock that falls as it works, by a power limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench.measure import timing
from bench.measure.timing import Stopwatch

FLUSH_MS = 0.06


@dataclass
class Gpu:
    """A device and a host with a queue between them, in milliseconds.

    Attributes:
        slower: How much longer the same work takes on the warm chip; 0.2 is what an H200 at 700 W showed.
        warms_ms: Working so long closes all but 1/e of the way to warm; idling as long, to cool.
    """

    slower: float = 0.0
    warms_ms: float = 150.0
    host: float = 0.0
    device: float = 0.0
    heat: float = 0.0
    done: list[str] = field(default_factory=list)

    def launch(self, what: str, on_host: float, on_device: float) -> None:
        self.host += on_host
        if self.host > self.device:  # idle till then
            self.heat *= math.exp((self.device - self.host) / self.warms_ms)
            self.device = self.host
        took = on_device * (1 + self.slower * self.heat)
        self.heat = 1 - (1 - self.heat) * math.exp(-took / self.warms_ms)
        self.device += took
        self.done.append(what)

    def idle(self, ms: float) -> None:
        self.host = max(self.host, self.device) + ms

    def events(self) -> Any:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.device, gpu.host)

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        return Event

    def stopwatch(self) -> Stopwatch:
        """One that measures this device."""
        watch = Stopwatch(torch.device("cpu"))
        watch.device, watch.on_gpu = torch.device("cuda"), True
        watch.flush = lambda: self.launch("flush", 0.01, FLUSH_MS)  # type: ignore[method-assign]
        return watch


def install(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> Gpu:
    """Let CUDA events be the device's, and nothing be captured."""
    monkeypatch.setattr(torch.cuda, "Event", gpu.events())
    monkeypatch.setattr(timing, "_captured", lambda calls: None)
    return gpu
