"""What tests of comparisons share: ceilings that need not be measured, a peer that tells what it is prepared for."""

from __future__ import annotations

import torch

from bench.measure.comparison import groups
from bench.measure.roofline import Peaks
from bench.peers.torch import Eager

CPU = torch.device("cpu")
FOREVER = float("inf")
CEILINGS = Peaks(1.0, 1.0, None, "measured")


def compared(bench, chosen, deadline=FOREVER):
    """Entries of one group."""
    entries = []
    (group,) = groups(chosen)
    bench.compare(group, bench.peers, entries.append, deadline)
    return entries


class Counting(Eager):
    """Eager PyTorch that tells what it was prepared for."""

    def __init__(self, name, slow=False):
        self.name, self.slow, self.seen = name, slow, []

    def prepare(self, case, inputs):
        self.seen.append((case.name, inputs.seed))
        SEEN.append(self.name)
        return super().prepare(case, inputs)


SEEN: list[str] = []
