"""How long a call takes: cold L2, rotated inputs, median and spread; CUDA events, graph replay, or the CPU's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# Twice the last-level cache, and at least this much: an H200's L2 is 60 MB, and a 256 MB fill is 60 us.
FLUSH_BYTES = 256 << 20
CPU_FLUSH_BYTES = 64 << 20
# Below this a launch's own time on the host shows between events; a graph's replay hides it.
GRAPH_BELOW_MS = 0.2
FEWEST, MOST = 3, 100


@dataclass(frozen=True)
class Timing:
    """Times of repeated calls.

    Attributes:
        median_ms: The middle one.
        low_ms: A tenth are faster.
        high_ms: A tenth are slower.
        repeats: Calls that were timed.
        clock: ``"events"``, ``"graph"`` or ``"cpu"``.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    clock: str


class Stopwatch:
    """Times calls on one device; holds the buffer whose overwriting empties the cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = max(FLUSH_BYTES, 2 * int(torch.cuda.get_device_properties(device).L2_cache_size))
        else:
            size = CPU_FLUSH_BYTES
        self._flush = torch.empty(size // 4, dtype=torch.int32, device=device)

    def time(self, calls: Sequence[Call], *, seconds: float = 0.5, graph: bool = True) -> Timing:
        """Time calls of the same work on different buffers, one after another.

        Args:
            calls: One per set of inputs, so that a repeat does not find the last one's in the cache.
            seconds: About how long to repeat; at least 3 and at most 100 calls. 0 on a CPU: one call, not warmed up,
                which is for dry runs through the interpreter.
            graph: Whether short calls on a GPU may be captured; what cannot be is timed with events.
        """
        if not calls:
            raise ValueError("calls must hold at least one call, got none")
        if self.device.type != "cuda" and seconds == 0:
            return self._on_cpu(calls, seconds, fewest=1)
        for call in calls:  # compiles, and fills the allocator's cache
            call()
        if self.device.type != "cuda":
            return self._on_cpu(calls, seconds, FEWEST)
        clock = "events"
        estimate = self._events(calls[0])
        if graph and estimate < GRAPH_BELOW_MS:
            graphs = _captured(calls)
            if graphs is not None:
                calls, clock = graphs, "graph"
        repeats = _repeats(seconds, estimate + 0.1)
        return _summary([self._events(calls[i % len(calls)]) for i in range(repeats)], clock)

    def flush(self) -> None:
        """Empty the cache."""
        self._flush.zero_()

    def _events(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The fill keeps the device busy while the host prepares the launch, so no launch gap is timed.
        self.flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _on_cpu(self, calls: Sequence[Call], seconds: float, fewest: int) -> Timing:
        times: list[float] = []
        while len(times) < MOST and (len(times) < fewest or sum(times) < 1e3 * seconds):
            self.flush()
            start = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(1e3 * (time.perf_counter() - start))
        return _summary(times, "cpu")


def _repeats(seconds: float, estimate_ms: float) -> int:
    return max(FEWEST, min(MOST, int(1e3 * seconds / max(estimate_ms, 1e-3))))


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


def _summary(times: Sequence[float], clock: str) -> Timing:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered), clock)
