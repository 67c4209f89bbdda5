"""The denoising step of a forward pass. It belongs to the calling context, never to the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from happyhorse_fast.arguments import require_whole
from happyhorse_fast.fast.config import FastConfig, is_exact_step

Rule = tuple[int, int]
"""(exact_first_steps, exact_last_steps)."""


@dataclass(frozen=True)
class Step:
    """A denoising step.

    Attributes:
        index: 0-based.
        count: Steps of the run.
        exact: What the step is to the rules that models ask for.
    """

    index: int
    count: int
    exact: dict[Rule, bool] = field(default_factory=dict)

    def answer(self, rule: Rule) -> bool:
        """Whether ``sparsity`` is left out; kept for :data:`_CALL`."""
        self.exact[rule] = is_exact_step(self.index, self.count, *rule)
        return self.exact[rule]


_STEP: ContextVar[Step | None] = ContextVar("happyhorse_fast.step", default=None)
# Rules that models ask for; there are as many as configurations.
_rules: dict[Rule, None] = {}


class _Call:
    # torch.compile reads a property of a builtin as it is, and guards its value. What it reads is the answer to a rule:
    # a guard on the index would compile every step anew.
    step = property(_STEP.get)


_CALL: Any = _Call()


@contextmanager
def at_step(step: int, steps: int) -> Iterator[None]:
    """Say where in a denoising run the calls inside are: ``exact_first_steps`` and ``exact_last_steps`` go by it.

    ``sample`` and ``super_resolve`` do so themselves; it is for a loop of your own, with an accelerated model of either
    signature::

        for i in range(steps):
            with happyhorse_fast.at_step(i, steps):
                velocities = model(video, audio, text)

    It holds in this thread and this asyncio task alone (a context variable), and for every model that is called inside.
    Of nested ones the inner holds.

    Args:
        step: 0-based step.
        steps: Steps of the run.

    Raises:
        TypeError: They are no integers.
        ValueError: Not 0 <= step < steps.
    """
    steps = require_whole("steps", steps, 1)
    step = require_whole("step", step, 0, steps - 1)
    here = Step(step, steps)
    for rule in tuple(_rules):
        here.answer(rule)
    token = _STEP.set(here)
    try:
        yield
    finally:
        _STEP.reset(token)


def step_in_words() -> str:
    """Where this call is in a run, for what ranks compare."""
    step = _STEP.get()
    return "outside of at_step" if step is None else f"step {step.index} of {step.count}"


def is_exact(fast: FastConfig) -> bool:
    """Whether this call is of a step in which ``sparsity`` does not apply.

    Raises:
        ValueError: That depends on the step, and the call is not inside :func:`at_step`.
    """
    rule = (fast.exact_first_steps, fast.exact_last_steps)
    if fast.sparsity is None or rule == (0, 0):
        return False
    here = answer(*rule)
    if torch.compiler.is_dynamo_compiling():
        exact: bool = _CALL.step.exact[rule]
        return exact
    return here


def answer(first: int, last: int) -> bool:
    """What this step is to a rule, which every later one answers too; runs for real while torch compiles a graph."""
    step, rule = _STEP.get(), (first, last)
    if step is None:
        raise ValueError(
            f"exact_first_steps={first} and exact_last_steps={last} need to know the denoising step of this call: "
            "sample with happyhorse_fast.sample, or call the model inside "
            '"with happyhorse_fast.at_step(step, steps):"; a thread of its own needs one of its own'
        )
    _rules[rule] = None
    return step.answer(rule)
