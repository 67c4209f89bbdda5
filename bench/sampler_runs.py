"""The runs of the sampler that are timed, in order: preset, mode, mask and memory cap."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import step_costs
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig, Precision, TopK
from happyhorse_fast.tokens import tokens_for

BASE, DENSE = "happyhorse-1.0-15b", "happyhorse-1.0-15b-dense"
FIRST_STAGE, SECOND_STAGE = "davinci-magihuman", "davinci-magihuman-sr-1080p"
EXACT = "exact"
PUBLISHED_SECONDS = 5
"""Length of the clips that published times are of."""
# Steps of a run are stopped after so long, two at least. A fast run of 8 steps at 1080p ends within it.
MOST = {"fast": 40.0, "other": 10.0}
# Seconds that a run takes beside its steps: weights 5, and compiles; torch.compile makes 4 graphs of 20 to 60 s each.
BESIDE = {"fast": 15.0, "eager": 10.0, "torch.compile": 200.0}


class Mode(NamedTuple):
    """A way to run the model.

    Attributes:
        precision: Of products; None in eager modes.
        attention: Its precision, likewise.
        step: Seconds of (attention, all else) in a step of :data:`BASE` at 1080p, 5 s on an H200.
    """

    precision: Precision | None
    attention: AttentionPrecision | None
    step: tuple[float, float]


MODES = {
    "fast fp8": Mode("fp8", "fp8", (3.07, 1.00)),
    "fast int8": Mode("int8", "int8_qk", (3.65, 1.15)),
    "fast fp8 linear": Mode("fp8", "bf16", (3.55, 1.05)),
    "fast fp8 int8_qk": Mode("fp8", "int8_qk", (3.65, 1.13)),
    "fast fp8 int8_qk_fp8_v": Mode("fp8", "int8_qk_fp8_v", (3.20, 1.03)),
    "fast bf16": Mode("bf16", "bf16", (3.55, 1.95)),
    "eager": Mode(None, None, (3.93, 4.97)),
    "torch.compile": Mode(None, None, (3.93, 4.97)),
}
"""Fast int8 and fast fp8 int8_qk are what FastConfig(precision="int8") and (precision="fp8") do. Seconds by results of
commits 6f0f680, 3a38272 and 84b4cbf. Products in int8 and bf16, in no clip since they changed, by their ops' times;
int8_qk_fp8_v predicted from fp8's; torch.compile as eager."""


@dataclass(frozen=True)
class Run:
    """One run of a sampler.

    Attributes:
        preset: The model.
        resolution: Of the clip.
        mode: One of :data:`MODES`.
        mask: :data:`EXACT`, or the share of video pairs such as ``"25%"``.
        steps: Denoising steps.
        cap_gb: Size of the card whose memory the process may use, as it is sold; None for all there is.
        seconds: Length of the clip.
    """

    preset: str
    resolution: str
    mode: str
    mask: str = EXACT
    steps: int = 8
    cap_gb: int | None = None
    seconds: int = PUBLISHED_SECONDS

    @property
    def name(self) -> str:
        """Such as ``"happyhorse-1.0-15b/1080p/fast fp8/25%/whole"``, the last part ``"24gb"`` under a cap.

        The second part is ``"1080p-10s"`` for a clip of another length than 5 s.
        """
        cap = "whole" if self.cap_gb is None else f"{self.cap_gb}gb"
        length = "" if self.seconds == PUBLISHED_SECONDS else f"-{self.seconds}s"
        return f"{self.preset}/{self.resolution}{length}/{self.mode}/{self.mask}/{cap}"

    @property
    def fast(self) -> FastConfig | None:
        """The model's FastConfig; None in the eager modes."""
        precision, attention, _ = MODES[self.mode]
        if precision is None:
            return None
        sparsity = None if self.mask == EXACT else TopK(float(self.mask.removesuffix("%")) / 100)
        return FastConfig(precision=precision, attention=attention, sparsity=sparsity, strict=True)

    @property
    def most_time(self) -> float:
        """Seconds that its steps may take where nothing else is asked for."""
        return MOST["fast" if self.fast else "other"]

    @property
    def least_time(self) -> float:
        """With fewer seconds left it would be cut: of the first step, two that are timed, and one by ops."""
        return BESIDE["fast" if self.fast else self.mode] + 4 * self.step_seconds

    @property
    def step_seconds(self) -> float:
        """Predicted of a step on an H200: its mode's, by the plan's FLOPs of attention and of all else."""
        here, there = flops(self), flops(Run(BASE, "1080p", self.mode))
        return sum(taken * a / b for taken, a, b in zip(MODES[self.mode].step, here, there, strict=True))


@functools.lru_cache
def flops(run: Run) -> tuple[float, float]:
    """FLOPs of (attention, all else) in a step."""
    share = None if run.mask == EXACT else float(run.mask.removesuffix("%")) / 100
    clip = tokens_for(run.resolution, "16:9", run.seconds)
    parts = {True: 0.0, False: 0.0}
    for cost in step_costs(ModelConfig.preset(run.preset), clip, video_share=share):
        parts[cost.op == "attention"] += cost.count * cost.flops
    return parts[True], parts[False]


def runs() -> list[Run]:
    """All runs, most important first; a model is made anew wherever preset, mode or cap change, which takes seconds."""
    found = [
        Run(BASE, "1080p", "fast fp8"),
        Run(BASE, "1080p", "fast fp8", "25%"),
        Run(BASE, "1080p", "fast fp8 linear"),
        Run(BASE, "1080p", "fast fp8 int8_qk_fp8_v"),
        Run(BASE, "1080p", "fast fp8 int8_qk"),
        Run(BASE, "1080p", "fast fp8", cap_gb=24),
        Run(BASE, "1080p", "fast int8"),
        Run(SECOND_STAGE, "1080p", "fast fp8", steps=5),
        Run(BASE, "1080p", "eager"),
        Run(BASE, "1080p", "fast bf16", cap_gb=48),
        Run(BASE, "1080p", "eager", cap_gb=80),
        Run(BASE, "1080p", "fast fp8", "12.5%"),
        *(Run(BASE, "1080p", mode, "25%") for mode in ("fast fp8 int8_qk_fp8_v", "fast fp8 int8_qk")),
        *(Run(BASE, "1080p", "fast fp8", seconds=seconds) for seconds in (10, 15)),
        *(Run(BASE, resolution, "fast fp8") for resolution in ("540p", "256p")),
    ]
    for mask in (EXACT, "25%", "12.5%"):
        found += [Run(BASE, "1080p", mode, mask) for mode in ("fast bf16", "fast int8")]
    *others, compiled = MODES
    for mode in others:
        found += [Run(SECOND_STAGE, "1080p", mode, steps=5), Run(FIRST_STAGE, "256p", mode), Run(DENSE, "1080p", mode)]
    for mode in ("fast bf16", "eager", "fast fp8", "fast int8"):
        caps = (24, 48, 80) if mode == "fast int8" else (48, 80)
        found += [Run(BASE, "1080p", mode, cap_gb=cap) for cap in caps]
    found += [Run(BASE, "1080p", compiled), Run(SECOND_STAGE, "1080p", compiled, steps=5)]
    found += [Run(FIRST_STAGE, "256p", compiled), Run(DENSE, "1080p", compiled)]
    return list(dict.fromkeys(found))


def chosen(words: str, modes: str = "") -> list[Run]:
    """Runs whose name holds one of the comma-separated words, in the words' order; without words all, in their own.

    Raises:
        ValueError: A word is in no name, or there is no such mode.
    """
    for mode in filter(None, modes.split(",")):
        if mode not in MODES:
            raise ValueError(f"modes must be among {', '.join(MODES)}; got {mode!r}")
    every = [run for run in runs() if not modes or run.mode in modes.split(",")]
    found: dict[Run, None] = {}
    for word in filter(None, words.split(",")):
        fitting = [run for run in every if word in run.name]
        if not fitting:
            raise ValueError(f"runs must be parts of names such as {every[0].name}; got {word!r}")
        found |= dict.fromkeys(fitting)
    return list(found) if words else every
