"""What tests of comparisons share: ceilings that need not be measured, a peer that tells what it is prepared for."""

from __future__ import annotations

import torch

from bench.measure.comparison import groups
from bench.measure.roofline import Peaks
from bench.peers.registry import PEERS, Peer

CPU = torch.device("cpu")
FOREVER = float("inf")
EAGER = PEERS[0]
CEILINGS = Peaks(1.0, 1.0, None, "measured")


def compared(bench, chosen, deadline=FOREVER):
    """Entries of one group."""
    (group,) = groups(chosen)
    bench.found.clear()
    bench.compare(group, bench.peers, deadline)
    return list(bench.found.values())


def standing_in(name, prepare, slow=False):
    """A peer of eager PyTorch's ops."""
    return Peer(name, EAGER.ops, prepare, on_gpus="", slow=slow)


class Counting(Peer):
    """Eager PyTorch that tells what it was prepared for."""

    def __init__(self, name, slow=False):
        super().__init__(name, EAGER.ops, self.counted, on_gpus="", slow=slow)
        self.seen = []

    def counted(self, case, given):
        self.seen.append((case.name, float(given["hidden"].sum())))
        SEEN.append(self.name)
        return EAGER.prepare(case, given)


SEEN: list[str] = []
