"""Who waits for whom in the Hopper attention kernel, over two steps in bf16: docs/kernels/attention_turns.svg.

Lengths are the model's below, in cycles of one SM, not measured: what the units of an SM can do at their peaks.
"""

from __future__ import annotations

from bench.report.lanes import BLUE, GREEN, GREY, ORANGE, Arrow, Bar, Picture

PRODUCT = 512
"""64 x 128 x 128 in bf16 at 4096 FLOP a cycle: QK or PV of one group's step."""
EXPONENTS = 512
"""64 x 128 of them, 16 a cycle; scaling them is issued beside."""
PACKING = 160
"""Rounding P, and summing it: 32 + 64 + 64 instructions of each of a group's four warps, each on its own scheduler."""
LOAD = 360
"""Of a tile of 32 KB of k or v, a share of L2 at 5.7 TB/s and its latency."""
ISSUE = 30
STEPS = 5
"""Drawn are the third and the fourth: by then the order is that of all that follow."""
LANES = {"loading warp": GREY, "group 0": BLUE, "group 1": ORANGE, "tensor cores": GREEN}


def schedule(steps: int = STEPS) -> tuple[list[Bar], list[Arrow], float]:
    """Bars and arrows, and cycles between two of a group's turns once all is running."""
    bars: list[Bar] = []
    arrows: list[Arrow] = []
    free, passed = 0.0, 0.0
    ready = [0.0, 0.0]
    begun: list[float] = []
    for step in range(steps):
        for group in (0, 1):
            name = f"group {group}"
            turn = max(ready[group], passed)
            if turn > ready[group] > 0:
                bars.append(Bar(name, ready[group], turn, "its turn?", name, faint=True))
            passed = turn + ISSUE
            bars.append(Bar(name, turn, passed, "", name))
            arrows.append(Arrow(passed, name, f"group {1 - group}", "turn"))
            qk = max(turn, free)
            pv = qk + PRODUCT
            free = pv + PRODUCT
            begun.append(qk)
            bars.append(Bar("tensor cores", qk, pv, f"QK {step}", name))
            bars.append(Bar("tensor cores", pv, free, f"PV {step - 1}", name))
            bars.append(Bar(name, passed, pv, f"waits for S {step}", name, faint=True))
            exponents = pv + EXPONENTS
            bars.append(Bar(name, pv, exponents, f"exponents {step}", name))
            packed = max(exponents, free) + PACKING
            bars.append(Bar(name, packed - PACKING, packed, "sum P", name))
            ready[group] = packed
        # k's slot has been empty since both had their S, but the loading warp keeps to its order: v, then the next k.
        arrows.append(Arrow(free, "group 1", "loading warp", f"v {step - 1} released"))
        for at, tile in enumerate((f"v {step + 1}", f"k {step + 2}")):
            bars.append(Bar("loading warp", free + at * LOAD, free + (at + 1) * LOAD, tile, "loading warp"))
        arrows.append(Arrow(free + 2 * LOAD, "loading warp", "group 0", f"k {step + 2} full"))
    return bars, arrows, begun[-1] - begun[-3]


def picture() -> Picture:
    """The figure."""
    bars, arrows, period = schedule()
    first = [bar.start for bar in bars if bar.label.startswith("QK")][4]
    title = f"Two steps in bf16: both groups' {period:.0f} cycles, all of them the tensor cores'"
    return Picture(title, LANES, bars, arrows, first, first + 2 * period, tick=512)
