"""Parts on the device: one at a time where the card is small, or each kept once it is there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

P = TypeVar("P")


class Residency:
    """Loads parts when they are needed.

    Args:
        device: Where they go.
        keep: Whether parts stay on the device after their use.
    """

    def __init__(self, device: torch.device, keep: bool) -> None:
        self.device, self.keep = device, keep
        self._held: dict[str, Any] = {}

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parts that are on the device."""
        return tuple(self._held)

    @contextmanager
    def using(self, name: str, load: Callable[[], P]) -> Iterator[P]:
        """A part on the device. Whoever enters must hold no other name of it afterwards, or its memory stays taken."""
        if name not in self._held:
            if not self.keep:
                self.free()
            self._held[name] = load()
        try:
            yield self._held[name]
        finally:
            if not self.keep:
                self._held.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Take every part off the device that is none of ``names``."""
        gone = [name for name in self._held if name not in names]
        for name in gone:
            del self._held[name]
        if gone:
            self._give_back()

    def free(self) -> None:
        """Take every part off the device, and give its memory back to it."""
        self._held.clear()
        self._give_back()

    def _give_back(self) -> None:
        gc.collect()  # a model's modules refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
