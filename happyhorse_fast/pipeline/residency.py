"""Parts on the device: those that stay there, and others that make room; these wait in host memory where it allows."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from happyhorse_fast.pipeline.host_weights import HostWeights, available_bytes, host_bytes

logger = logging.getLogger(__name__)

P = TypeVar("P")
HOST_SPEED = 2.5e10
"""Bytes a second from pinned host memory, over PCIe 4.0 x16."""


@dataclass
class _Part:
    """A part that was loaded.

    Attributes:
        part: It.
        how: What it was loaded with.
        seconds: Which that took.
        here: Whether it is on the device; else it waits on the host.
        host: Its weights there; None while it never left, and on a CPU, which is host and device in one.
        host_bytes: That it takes there.
    """

    part: Any
    how: object
    seconds: float
    here: bool = True
    host: HostWeights | None = None
    host_bytes: int = 0

    @property
    def module(self) -> nn.Module:
        """What holds its weights."""
        return getattr(self.part, "module", self.part)


class Residency:
    """Loads parts when they are needed.

    Args:
        device: Where they go.
        on_host: Whether a part that makes room waits in host memory, where half of that is enough; otherwise it is
            loaded again.

    Attributes:
        kept: Names of the parts that stay on the device after their use.
    """

    def __init__(self, device: torch.device, on_host: bool) -> None:
        self.device, self.on_host = device, on_host
        self.kept: Collection[str] = ()
        self._parts: dict[str, _Part] = {}

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parts that are on the device."""
        return tuple(name for name, part in self._parts.items() if part.here)

    def seconds_to_bring(self, name: str) -> float | None:
        """Predicted seconds until a part is on the device; None where it has to be loaded."""
        part = self._parts.get(name)
        return None if part is None else 0.0 if part.here else part.host_bytes / HOST_SPEED

    @contextmanager
    def using(self, name: str, load: Callable[[], P], how: object = None) -> Iterator[P]:
        """A part on the device. Whoever enters must hold no other name of it afterwards, or its memory stays taken.

        Args:
            name: Of the part.
            load: Loads it.
            how: What makes one loaded part of that name unlike another.
        """
        if name in self._parts and self._parts[name].how != how:
            del self._parts[name]
        if name not in self.held:
            self._give_back()
            self._bring(name, load, how)
        try:
            yield self._parts[name].part
        except BaseException:
            self._rest(name, copy=False)
            raise
        self._rest(name, copy=True)

    def keep_only(self, names: Collection[str]) -> None:
        """Let these parts stay on the device from now on, and take every other off it."""
        self.kept = names
        for name in self.held:
            self._rest(name, copy=True)
        self._give_back()

    def free(self) -> None:
        """Take what is not kept off the device, whatever happened, and give the memory back to it."""
        for name in self.held:
            self._rest(name, copy=False)
        self._give_back()

    def _bring(self, name: str, load: Callable[[], Any], how: object) -> None:
        if name not in self._parts:
            begun = time.perf_counter()
            part = load()
            self._parts[name] = _Part(part, how, time.perf_counter() - begun)
            return
        found = self._parts[name]
        if found.host is not None:
            found.host.come(self.device)
        found.here = True

    def _rest(self, name: str, *, copy: bool) -> None:
        """Take a part that is not kept off the device; ``copy``: to the host, if it never was there."""
        if name in self.kept:
            return
        part = self._parts[name]
        if not part.host_bytes and not (copy and self._copied(name, part)):
            del self._parts[name]
            return
        if part.host is not None:
            part.host.leave()
        part.here = False

    def _copied(self, name: str, part: _Part) -> bool:
        """Copy a part to the host where there is room; others that were quicker to load give way to it."""
        pinned = self.device.type == "cuda"
        needed = host_bytes(part.module, pinned) if self.on_host else 0
        if not needed or not self._make_room(needed, part.seconds):
            return False
        if self.device.type != "cpu":
            try:
                part.host = HostWeights(part.module, pinned)
            except (RuntimeError, MemoryError) as error:
                logger.warning("%s cannot wait on the host, it will be loaded again: %s", name, error)
                return False
        part.host_bytes = needed
        return True

    def _make_room(self, needed: int, seconds: float) -> bool:
        """Whether half of the host's memory holds so much more; if need be without parts that were quicker to load."""
        waiting = sorted((part.seconds, name) for name, part in self._parts.items() if part.host_bytes)
        taken = sum(self._parts[name].host_bytes for _, name in waiting)
        room = (available_bytes() + taken) // 2 - needed
        going: list[str] = []
        for saved, name in waiting:
            if taken <= room:
                break
            seconds -= saved
            taken -= self._parts[name].host_bytes
            going.append(name)
        if taken > room or seconds < 0:
            return False
        for name in going:
            self._forget(name)
        return True

    def _forget(self, name: str) -> None:
        """Give up a part's place on the host."""
        part = self._parts[name]
        if part.here:
            part.host, part.host_bytes = None, 0
        else:
            del self._parts[name]

    def _give_back(self) -> None:
        gc.collect()  # a model's modules refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
