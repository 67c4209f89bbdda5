"""Every peer there is: each used where it is installed, and named as absent, with the reason, where not."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.peers import external
from bench.peers import torch as own
from bench.peers.peer import Peer


def all_peers() -> tuple[Peer, ...]:
    """Every peer, installed or not, in the order they are timed in."""
    return (
        own.Eager(),
        *(own.Sdpa(backend) for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")),
        own.ScaledMM(),
        own.IntMM(),
        own.Bf16MM(),
        external.FlashAttention4(),
        external.CudnnFp8(),
        external.SageAttention(),
        own.Flex(),
        own.Compiled(),
    )


def split(peers: Iterable[Peer], device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """(those that can run here, reasons of those that cannot by name)."""
    reasons = {peer: peer.available(device) for peer in peers}
    return [p for p, reason in reasons.items() if reason is None], {p.name: r for p, r in reasons.items() if r}
