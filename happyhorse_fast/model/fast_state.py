"""What an accelerated model carries beside its packed layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.model.clip_state import ClipState, Step
from happyhorse_fast.model.fast_config import FastConfig
from happyhorse_fast.ops.dispatch import Choice

# About 20 operations on a block, each a launch of 10 us.
PLAIN_SECONDS_PER_BLOCK = 2e-4
WORTH_A_WARNING = 1.0
"""Minutes of a forward pass that are said beforehand."""


@dataclass
class FastState:
    """What an accelerated model carries beside its packed layers.

    Attributes:
        config: The model's configuration.
        fast: How it is accelerated.
        choices: Implementation and reason per op.
        originals: The layers that were replaced, on the CPU; empty where they were dropped.
        eager_class: The model's class before.
        step: Where in a sampler's run the model is.
        clips: State of the clips seen last, by their key.
        ensure_clip: Makes sure that ``clips`` has a clip, by its five sizes; set by :func:`install`.
    """

    config: ModelConfig
    fast: FastConfig
    choices: dict[str, Choice]
    originals: list[nn.Module]
    eager_class: type[nn.Module]
    step: Step = field(default_factory=Step)
    clips: dict[Any, ClipState] = field(default_factory=dict)
    ensure_clip: Callable[..., bool] = field(init=False)

    # Two clips, so that guidance, whose prompt and null prompt differ in length, computes neither twice.
    MOST_CLIPS = 2

    def clip_state(self, key: Any, build: Callable[[], ClipState]) -> ClipState:
        """The state of a clip, built at its first use."""
        if key not in self.clips:
            while len(self.clips) >= self.MOST_CLIPS:
                self.clips.pop(next(iter(self.clips)))
            self.clips[key] = state = build()
            self._warn_of_plain_attention(state)
        return self.clips[key]

    def _warn_of_plain_attention(self, state: ClipState) -> None:
        """Say before the first layer what would else look like a hang."""
        choice = self.choices.get("block_sparse_attention")
        if choice is None or choice.backend != "reference":
            return
        local = len(self.config.local_attn_layers)
        layers = ((state.local, local), (state.dense, self.config.num_layers - local))
        blocks = sum(sum(block_map.blocks()) * count for block_map, count in layers)
        minutes = blocks * PLAIN_SECONDS_PER_BLOCK / 60
        if minutes >= WORTH_A_WARNING:
            warnings.warn(
                f"attention runs in plain torch, {blocks:,} blocks one after another: expect at least {minutes:.0f} "
                f"minutes per forward pass of this clip ({state.rows.slots:,} rows); {choice.reason}",
                stacklevel=2,
            )


def is_accelerated(model: nn.Module) -> bool:
    """Whether :func:`accelerate` was applied."""
    return isinstance(getattr(model, "fast", None), FastState)


@contextmanager
def at_step(model: object, index: int, count: int) -> Iterator[None]:
    """Tell an accelerated model its place in a sampler's run while it is inside; other models are left alone.

    Args:
        model: Any denoiser.
        index: 0-based step.
        count: Steps of the run.
    """
    state = getattr(model, "fast", None)
    if not isinstance(state, FastState):
        yield
        return
    state.step.index, state.step.count = index, count
    try:
        yield
    finally:
        state.step.index = state.step.count = None
