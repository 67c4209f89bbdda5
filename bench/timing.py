"""How long a call takes: cold L2, rotated inputs, median and spread; CUDA events, graph replay, or the CPU's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# Twice the last-level cache as the driver states it (50 MB on an H100), and at least this much, which takes 56 us at
# the 4.8 TB/s of an H200 and 0.13 ms at the 2 TB/s of an A100.
FLUSH_BYTES = 256 << 20
FLUSH_MS = 0.1
CPU_FLUSH_BYTES = 64 << 20
# Flushes in front of the first call, 0.4 ms of an H200: a head start, so that the device never waits for the host.
HEAD_START = 8
# A call that the host needs longer to launch than the device needs for it and a flush (0.1 to 0.4 ms for a Triton op,
# more for several launches) leaves the device idle between its events. A graph's replay is one launch.
GRAPH_BELOW_MS = 2.0
FEWEST, MOST = 5, 100


@dataclass(frozen=True)
class Timing:
    """Times of repeated calls.

    Attributes:
        times_ms: One per call, in the order of the calls.
        clock: ``"events"``, ``"graph"`` (events around a graph's replay) or ``"cpu"``.
    """

    times_ms: tuple[float, ...]
    clock: str

    @property
    def median_ms(self) -> float:
        """The middle one."""
        return statistics.median(self.times_ms)

    @property
    def low_ms(self) -> float:
        """A tenth are faster."""
        return sorted(self.times_ms)[len(self.times_ms) // 10]

    @property
    def high_ms(self) -> float:
        """A tenth are slower."""
        return sorted(self.times_ms)[-1 - len(self.times_ms) // 10]


class Recorded:
    """A timing played back as calls and a clock, for what times calls itself.

    pytest-benchmark reads a clock of the host before and after a call, which on a GPU holds the launch and no device
    time. With these two in the places of its call and its clock, its statistics are of what a :class:`Stopwatch`
    measured.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._left: Iterator[float] = iter(())

    def load(self, timing: Timing) -> None:
        """Play this timing next."""
        self._left = iter(timing.times_ms)

    def call(self) -> None:
        """Take as long as the next recorded call did."""
        self._now += next(self._left) / 1e3

    def seconds(self) -> float:
        """Seconds of all calls so far."""
        return self._now


class Stopwatch:
    """Times calls on one device; holds the buffer whose reading empties the cache.

    Reading, not writing: up to 50 MB of written lines would stay in an H100's cache, and their way to memory, 17 us,
    fall into the next call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = max(FLUSH_BYTES, 2 * int(torch.cuda.get_device_properties(device).L2_cache_size))
        else:
            size = CPU_FLUSH_BYTES
        self._flush = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def time(self, calls: Sequence[Call], *, seconds: float = 0.5, graph: bool = True) -> Timing:
        """Time calls of the same work on different buffers, one after another.

        Args:
            calls: One per set of inputs, so that a repeat does not find the last one's in the cache.
            seconds: About how long to repeat; at least 5 and at most 100 calls. 0 on a CPU: one call, not warmed up,
                which is for dry runs through the interpreter.
            graph: Whether short calls on a GPU may be captured; what cannot be is timed with events.
        """
        if not calls:
            raise ValueError("calls must hold at least one call, got none")
        if self.device.type != "cuda" and seconds == 0:
            return Timing(tuple(self._host_ms(calls, 0.0, fewest=1)), "cpu")
        for call in calls:  # compiles, and fills the allocator's cache
            call()
        if self.device.type != "cuda":
            return Timing(tuple(self._host_ms(calls, seconds, FEWEST)), "cpu")
        times, clock = self._device_ms(calls, FEWEST), "events"
        if graph and statistics.median(times) < GRAPH_BELOW_MS:
            graphs = _captured(calls)
            if graphs is not None:
                calls, clock = graphs, "graph"
                times = self._device_ms(calls, FEWEST)
        wanted = min(MOST, int(1e3 * seconds / (statistics.median(times) + FLUSH_MS)))
        if wanted > FEWEST:  # else those were enough
            times = self._device_ms(calls, wanted)
        return Timing(tuple(times), clock)

    def flush(self) -> None:
        """Fill the cache with what need not be written back."""
        self._flush.sum(dtype=torch.int32)

    def _device_ms(self, calls: Sequence[Call], repeats: int) -> list[float]:
        """Events around every call, with nothing waited for before the last: the queue hides the host's time."""
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for _ in range(HEAD_START):
            self.flush()
        for i, (start, end) in enumerate(events):
            self.flush()
            start.record()
            calls[i % len(calls)]()
            end.record()
        events[-1][1].synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _host_ms(self, calls: Sequence[Call], seconds: float, fewest: int) -> list[float]:
        times: list[float] = []
        while len(times) < MOST and (len(times) < fewest or sum(times) < 1e3 * seconds):
            self.flush()
            start = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(1e3 * (time.perf_counter() - start))
        return times


def _captured(calls: Sequence[Call]) -> list[Call] | None:
    """Each call as a CUDA graph's replay; None where one cannot be captured."""
    replays: list[Call] = []
    try:
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            replays.append(graph.replay)
    except RuntimeError:  # a peer that waits for the device or allocates outside torch
        torch.cuda.synchronize()
        return None
    return replays
