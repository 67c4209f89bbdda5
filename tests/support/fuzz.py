"""How many examples Hypothesis draws for a test: as many as it says, in `make fuzz` twenty times as many."""

from __future__ import annotations

from hypothesis import settings

BASE = settings.get_profile("repeatable").max_examples


def examples(count: int) -> settings:
    """Decorator in place of ``settings(max_examples=count)``, which no profile could raise."""
    return settings(max_examples=count * settings().max_examples // BASE)
