"""Times of calls: contestants interleaved in rounds on a warm chip, each with a cold cache and rotated inputs.

A chip at its power limit lowers its clock as it warms: a kernel that is timed first looks up to 20 % faster than the
same kernel after it. So what is compared takes turns (A B A B ...) after a while of the same turns that is not timed,
and only times of one :class:`Span` are comparable. Clocks are CUDA events, graph replay, or the CPU's.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from happyhorse_fast.verify.op_times import apart_ms, moment

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
# Calls that say about how long one takes.
PILOT = 2
FEWEST, MOST = 5, 5000
"""Timed rounds."""
SPAN_SECONDS = 1.0
"""A comparison is timed for at least so long."""
WARM_SECONDS = 0.5
"""Before it, the same rounds run so long untimed: the board's power regulator settles within tenths of a second."""


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


@dataclass(frozen=True)
class Span:
    """Timings of contestants that took turns.

    Attributes:
        name: Unlike any other span's, of this process or another.
        timings: By contestant.
        began: On ``time.monotonic``'s clock, when the timed rounds began.
        ended: And ended.
    """

    name: str
    timings: Mapping[Any, Timing]
    began: float
    ended: float


@dataclass(frozen=True)
class Prepared:
    """A contestant that has run.

    Attributes:
        calls: One per set of inputs.
        clock: As :attr:`Timing.clock`.
        about_ms: About how long one takes; 0 where it was not tried.
    """

    calls: Sequence[Call]
    clock: str
    about_ms: float


class Failed(RuntimeError):
    """A contestant raised while turns were taken; ``contestant`` names it."""

    def __init__(self, contestant: Any, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.contestant = contestant


class Stopwatch:
    """Times calls on one device; holds the buffer whose reading empties the cache.

    Reading, not writing: up to 50 MB of written lines would stay in an H100's cache, and their way to memory, 17 us,
    fall into the next call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            size = max(FLUSH_BYTES, 2 * int(torch.cuda.get_device_properties(device).L2_cache_size))
        else:
            size = CPU_FLUSH_BYTES
        self._flush = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def prepare(self, calls: Sequence[Call], *, dry: bool = False) -> Prepared:
        """Run a contestant's calls once, which compiles and fills the allocator's cache, and see how long one takes.

        Short calls on a GPU are captured; what cannot be is timed with events.

        Args:
            calls: Of the same work, one per set of inputs, so that a repeat does not find the last one's in the cache.
            dry: Run nothing on a CPU: for dry runs through the interpreter.
        """
        if not calls:
            raise ValueError("calls must hold at least one call, got none")
        if dry and not self.on_gpu:
            return Prepared(calls, "cpu", 0.0)
        for call in calls:
            call()
        about, clock = self._about_ms(calls), "events" if self.on_gpu else "cpu"
        if self.on_gpu and about < GRAPH_BELOW_MS:
            graphs = _captured(calls)
            if graphs is not None:
                calls, clock, about = graphs, "graph", self._about_ms(graphs)
        return Prepared(calls, clock, about)

    def interleave(
        self, contestants: Mapping[Any, Prepared], *, seconds: float = SPAN_SECONDS, warm: float = WARM_SECONDS
    ) -> Span:
        """Time contestants in turns: A B A B, first untimed, then timed, the device never idle between them.

        Args:
            contestants: What takes turns, in this order.
            seconds: Of all timed rounds together, 5 at least. 0 on a CPU: one round.
            warm: Of untimed rounds before them.

        Raises:
            Failed: A contestant raised.
        """
        round_ms = sum(self._turn_ms(prepared) for prepared in contestants.values())
        rounds = min(MOST, max(FEWEST, math.ceil(1e3 * seconds / max(round_ms, 1e-3))))
        warm_rounds = min(MOST, math.ceil(1e3 * warm / max(round_ms, 1e-3)))
        if not self.on_gpu and not seconds:
            rounds, warm_rounds = 1, 0
        if warm_rounds:
            self._rounds(contestants, range(warm_rounds))
        began = time.monotonic()
        times = self._rounds(contestants, range(warm_rounds, warm_rounds + rounds))
        timings = {name: Timing(tuple(taken), contestants[name].clock) for name, taken in times.items()}
        return Span(uuid.uuid4().hex[:12], timings, began, time.monotonic())

    def compare(self, contestants: Mapping[Any, Prepared], seconds: float) -> Span:
        """Let contestants take turns for so many seconds each; on a GPU for a second in all at least, once it is warm.

        Raises:
            Failed: A contestant raised.
        """
        whole = seconds * len(contestants)
        if not self.on_gpu:
            return self.interleave(contestants, seconds=whole, warm=0.0)
        return self.interleave(contestants, seconds=max(SPAN_SECONDS, whole))

    def least_seconds(self, prepared: Prepared) -> float:
        """Seconds that a contestant adds to the shortest span."""
        return FEWEST * self._turn_ms(prepared) / 1e3

    def flush(self) -> None:
        """Fill the cache with what need not be written back."""
        self._flush.sum(dtype=torch.int32)

    def _turn_ms(self, prepared: Prepared) -> float:
        return prepared.about_ms + (FLUSH_MS if self.on_gpu else 0.0)

    def _about_ms(self, calls: Sequence[Call]) -> float:
        return min(self._rounds({"": Prepared(calls, "", 0.0)}, range(PILOT))[""])

    def _rounds(self, contestants: Mapping[Any, Prepared], rounds: range) -> dict[Any, list[float]]:
        """Times of every call; of a GPU nothing is waited for before the last: the queue hides the host's time."""
        taken: dict[Any, list[tuple[Any, Any]]] = {name: [] for name in contestants}
        for _ in range(HEAD_START if self.on_gpu else 0):
            self.flush()
        end = None
        for i, (name, prepared) in itertools.product(rounds, contestants.items()):
            self.flush()
            start = moment(self.on_gpu)
            try:
                prepared.calls[i % len(prepared.calls)]()
            except Exception as error:  # whatever a driver or an allocator raises is this contestant's
                raise Failed(name, error) from error
            end = moment(self.on_gpu)
            taken[name].append((start, end))
        if self.on_gpu and end is not None:
            end.synchronize()
        return {name: [apart_ms(*one) for one in found] for name, found in taken.items()}


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
