"""Which prompts are trained on, and which are held out to measure with."""

from __future__ import annotations

import random

from happyhorse_fast.pony.prompt import Prompt, all_prompts

HELD_OUT = 64


def held_out_prompts() -> list[Prompt]:
    """64 of the 216 prompts, never trained on; the same on every machine."""
    return random.Random(20).sample(all_prompts(), HELD_OUT)


def training_prompts() -> list[Prompt]:
    """The others."""
    held_out = set(held_out_prompts())
    return [prompt for prompt in all_prompts() if prompt not in held_out]
