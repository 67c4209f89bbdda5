"""Weights of a part in host memory, from where a copy brings them back: nothing is read or packed again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from happyhorse_fast.checkpoint.stream import assign
from happyhorse_fast.fast.state import is_accelerated

BLOCK_BYTES = 2**30
"""Of one allocation: torch rounds pinned ones up to powers of two, and gives those of this size to any part again."""
_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


class HostWeights:
    """A copy of all tensors of a module, bit for bit, in blocks of host memory; they are taken not to change.

    Args:
        module: Whose tensors are copied: parameters, buffers and plain attributes. What is on "meta" stays out.
        pinned: Whether in pinned memory, for copies at the full speed of the bus.
    """

    def __init__(self, module: nn.Module, pinned: bool) -> None:
        self.module = module
        self._like = {key: _empty(tensor, torch.device("meta")) for key, tensor in _tensors(module)}
        total = sum(_flat_bytes(like) for like in self._like.values())
        self._blocks = [
            torch.empty(min(BLOCK_BYTES, total - start), dtype=torch.uint8, device="cpu", pin_memory=pinned)
            for start in range(0, total, BLOCK_BYTES)
        ]
        start = 0
        for _, tensor in _tensors(module):
            start = self._copy(_flat(tensor), start, to_host=True)

    def leave(self) -> None:
        """Take the module's tensors off its device, and what an accelerated model keeps there of clips."""
        for key, like in self._like.items():
            assign(self.module, key, like)
        if is_accelerated(self.module):
            self.module.fast.forget()  # type: ignore[union-attr,operator]

    def come(self, device: torch.device) -> None:
        """Put the tensors onto a device, with the strides that they had."""
        start = 0
        for key, like in self._like.items():
            tensor = _empty(like, device)
            start = self._copy(_flat(tensor), start, to_host=False)
            assign(self.module, key, tensor)

    def _copy(self, flat: torch.Tensor, start: int, *, to_host: bool) -> int:
        """Copy bytes to or from ``start`` on, across the ends of blocks; returns where the next tensor's begin."""
        done = 0
        while done < len(flat):
            block, first = divmod(start + done, BLOCK_BYTES)
            there = self._blocks[block][first : first + len(flat) - done]
            here = flat[done : done + len(there)]
            if to_host:
                there.copy_(here)
            else:
                here.copy_(there)
            done += len(there)
        return start + done


def host_bytes(module: nn.Module, pinned: bool) -> int:
    """Host memory that :class:`HostWeights` of a module would take."""
    total = sum(_flat_bytes(tensor) for _, tensor in _tensors(module))
    whole, rest = divmod(total, BLOCK_BYTES)
    return whole * BLOCK_BYTES + (1 << (rest - 1).bit_length() if pinned and rest else rest)


def available_bytes() -> int:
    """What the machine, or the control group that this process is limited to, has free or could free; 0 if unknown."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return available
    return max(0, min(available, limit - used + int(cached.get("inactive_file", 0))))


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """By key. Plain attributes too: where a codec has weight norm, a whole second set of weights is kept as such."""
    for path, owner in module.named_modules():
        plain = {name: value for name, value in vars(owner).items() if isinstance(value, torch.Tensor)}
        for name, tensor in {**owner._parameters, **owner._buffers, **plain}.items():
            if tensor is not None and not tensor.is_meta:
                yield f"{path}.{name}".lstrip("."), tensor


def _empty(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor in the order of memory, uint8."""
    size = _flat_bytes(tensor) // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,)).view(torch.uint8)


def _flat_bytes(tensor: torch.Tensor) -> int:
    """From its first to its last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()
