"""Progress over all stages: a record per step with the time that is left, a bar made from it, and each stage's cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from happyhorse_fast.sampler.progress import bar, peak_memory


@dataclass(frozen=True)
class StageInfo:
    """A finished step of a stage, as a ``callback`` gets it.

    Attributes:
        stage: Its name, such as ``"denoise"``.
        step: Number of the step within the stage, from 1.
        steps: Steps of the stage.
        seconds: Of the whole run so far.
        seconds_left: Estimate for all that is left; None before anything was measured.
        memory_bytes: Peak of the stage so far, as :attr:`happyhorse_fast.sampler.StepInfo.memory_bytes`.
        video: [1, 48, T, H, W] latent after the step, of stages that denoise. Clone it to change it.
        audio: [1, A, 64] latent after the step; likewise.
    """

    stage: str
    step: int
    steps: int
    seconds: float
    seconds_left: float | None
    memory_bytes: int | None
    video: torch.Tensor | None = field(default=None, repr=False)
    audio: torch.Tensor | None = field(default=None, repr=False)


Callback = Callable[[StageInfo], object]
"""Called after every step of every stage; what it returns is ignored, what it raises ends the run."""


@dataclass(frozen=True)
class StageCost:
    """What a stage took.

    Attributes:
        stage: Its name.
        seconds: Wall time, loading included.
        load_seconds: Of it, until its part was on the device; 0 where it was there already.
        peak_bytes: Peak of memory allocated on the CUDA device during the stage, elsewhere the process's largest
            resident set so far; None where neither is known.
    """

    stage: str
    seconds: float
    load_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a stage; only their ratios matter to the time that is left.

    Attributes:
        load: To bring its part to the device.
        compute: Of its steps together.
    """

    load: float
    compute: float


class Monitor:
    """Keeps the time of a run's stages, and tells of each step.

    Args:
        device: Whose memory is watched.
        work: Stage -> prediction, of all stages of the run in order.
        callback: Called with every step.
        shown: Whether to show a bar on standard error.
    """

    def __init__(
        self, device: torch.device, work: Mapping[str, Prediction], callback: Callback | None, shown: bool
    ) -> None:
        self.device, self.work, self.callback, self.shown = device, dict(work), callback, shown
        self.costs: list[StageCost] = []
        self._begun = time.perf_counter()
        self._show: Callable[[StageInfo], None] = lambda info: None
        self._stage, self._stage_begun, self._loaded, self._share = "", self._begun, 0.0, 0.0

    @contextmanager
    def display(self) -> Iterator[None]:
        """Show a bar while it is entered, where one is wanted."""
        with bar(next(iter(self.work), ""), 1.0, self.shown) as update:

            def show(info: StageInfo) -> None:
                left = "" if info.seconds_left is None else f"about {_clock(info.seconds_left)} left"
                if info.memory_bytes is not None:
                    left += f", peak {info.memory_bytes / 2**30:.1f} GiB"
                update(description=f"{info.stage} {info.step}/{info.steps}", completed=self._done_share(), note=left)

            self._show = show
            try:
                yield
            finally:
                self._show = lambda info: None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The stage that runs inside; its cost is kept where it ends well."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stage, self._stage_begun, self._loaded, self._share = name, time.perf_counter(), 0.0, 0.0
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._stage_begun
        self.costs.append(StageCost(name, seconds, self._loaded, peak_memory(self.device)))
        self._stage = ""

    def loaded(self) -> None:
        """Say that the stage's part is on the device."""
        self._loaded = time.perf_counter() - self._stage_begun

    def step(self, step: int, steps: int, video: torch.Tensor | None = None, audio: torch.Tensor | None = None) -> None:
        """Say that a step of the stage, from 1, is done."""
        self._share = step / steps
        now = time.perf_counter() - self._begun
        info = StageInfo(self._stage, step, steps, now, self.seconds_left(), peak_memory(self.device), video, audio)
        self._show(info)
        if self.callback is not None:
            self.callback(info)

    def seconds_left(self) -> float | None:
        """Predictions of what is left, scaled by how far those of what is done were off: loading and steps apart."""
        seen, predicted = [0.0, 0.0], [0.0, 0.0]
        for cost in self.costs:
            work = self.work[cost.stage]
            seen[0], predicted[0] = seen[0] + cost.load_seconds, predicted[0] + (work.load if cost.load_seconds else 0)
            seen[1], predicted[1] = seen[1] + cost.seconds - cost.load_seconds, predicted[1] + work.compute
        if self._stage:
            here = self.work[self._stage]
            seen[0], predicted[0] = seen[0] + self._loaded, predicted[0] + (here.load if self._loaded else 0)
            seen[1] += time.perf_counter() - self._stage_begun - self._loaded
            predicted[1] += here.compute * self._share
        if predicted[1] <= 0:
            return None
        compute = seen[1] / predicted[1]
        load = seen[0] / predicted[0] if predicted[0] > 0 else 1.0
        return self._left(load, compute)

    def _left(self, load: float = 1.0, compute: float = 1.0) -> float:
        """Predictions of what is left, scaled."""
        over = {cost.stage for cost in self.costs}
        left = 0.0
        for name, work in self.work.items():
            if name == self._stage:
                left += work.compute * (1 - self._share) * compute
            elif name not in over:
                left += work.load * load + work.compute * compute
        return left

    def _done_share(self) -> float:
        total = sum(work.load + work.compute for work in self.work.values())
        return 1 - self._left() / total if total > 0 else 1.0


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02} s"
