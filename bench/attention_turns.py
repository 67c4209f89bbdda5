"""Draw docs/kernels/attention_turns.svg: who waits for whom in the Hopper attention kernel, over two steps in bf16.

python -m bench.attention_turns

Lengths are the model's below, in cycles of one SM, not measured: what the units of an SM can do at their peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "kernels" / "attention_turns.svg"
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
LANES = {"loading warp": "#7a869a", "group 0": "#2f6fde", "group 1": "#d9822b", "tensor cores": "#3c9a5f"}
LEFT, TOP, LANE, BAR, WIDTH = 120, 64, 76, 34, 1060


@dataclass(frozen=True)
class Bar:
    """What a lane does from ``start`` on; ``owner`` is whose colour it has."""

    lane: str
    start: float
    end: float
    label: str
    owner: str
    faint: bool = False


@dataclass(frozen=True)
class Arrow:
    """Somebody goes on because of somebody else."""

    time: float
    source: str
    target: str
    label: str


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


def svg() -> str:
    """The figure."""
    bars, arrows, period = schedule()
    starts = [bar.start for bar in bars if bar.label.startswith("QK")]
    first, last = starts[4], starts[4] + 2 * period
    lanes = {name: TOP + LANE * i for i, name in enumerate(LANES)}
    lines = "\n".join(
        [*_frame(lanes, first, last, period), *_bars(bars, lanes, first, last), *_arrows(arrows, lanes, first, last)]
    )
    height = TOP + LANE * len(LANES) + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="#333"/></marker></defs>\n{lines}\n</svg>\n'
    )


def _x(time: float, first: float, last: float) -> float:
    return LEFT + WIDTH * (time - first) / (last - first)


def _frame(lanes: dict[str, int], first: float, last: float, period: float) -> Iterator[str]:
    height = TOP + LANE * len(lanes)
    yield f'<rect width="{LEFT + WIDTH + 20}" height="{height + 34}" fill="#fff"/>'
    title = f"Two steps in bf16: both groups' {period:.0f} cycles, all of them the tensor cores'"
    yield f'<text x="{LEFT}" y="24" font-size="15" fill="#222">{title}</text>'
    for name, y in lanes.items():
        yield f'<text x="{LEFT - 10}" y="{y + BAR / 2 + 4}" text-anchor="end" fill="#222">{name}</text>'
        yield f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y + BAR}" y2="{y + BAR}" stroke="#ddd"/>'
    for tick in range(0, int(last - first) + 1, 512):
        x = _x(first + tick, first, last)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 14}" y2="{height - 30}" stroke="#eee"/>'
        yield f'<text x="{x:.1f}" y="{height + 14}" text-anchor="middle" fill="#777">{tick}</text>'


def _bars(bars: list[Bar], lanes: dict[str, int], first: float, last: float) -> Iterator[str]:
    for bar in bars:
        start, end = max(bar.start, first), min(bar.end, last)
        if end <= start:
            continue
        x, width = _x(start, first, last), WIDTH * (end - start) / (last - first)
        color, opacity = LANES[bar.owner], 0.14 if bar.faint else 0.85
        yield (
            f'<rect x="{x:.1f}" y="{lanes[bar.lane]}" width="{width:.1f}" height="{BAR}" fill="{color}" '
            f'fill-opacity="{opacity}" stroke="#fff"/>'
        )
        if width > 7 * len(bar.label):
            text = "#333" if bar.faint else "#fff"
            middle = x + width / 2
            yield (
                f'<text x="{middle:.1f}" y="{lanes[bar.lane] + BAR / 2 + 4}" text-anchor="middle" fill="{text}">'
                f"{bar.label}</text>"
            )


def _arrows(arrows: list[Arrow], lanes: dict[str, int], first: float, last: float) -> Iterator[str]:
    for arrow in arrows:
        if not first <= arrow.time < last:
            continue
        x, down = _x(arrow.time, first, last), lanes[arrow.target] > lanes[arrow.source]
        start = lanes[arrow.source] + (BAR if down else 0)
        end = lanes[arrow.target] + (0 if down else BAR)
        yield (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{start}" y2="{end}" stroke="#333" stroke-width="1.3" '
            'marker-end="url(#tip)"/>'
        )
        label = lanes[arrow.target] + (BAR + 24 if not down else -18)
        yield f'<text x="{x + 5:.1f}" y="{label}" fill="#333">{arrow.label}</text>'


def main() -> None:
    """Write the figure."""
    FIGURE.write_text(svg())


if __name__ == "__main__":
    main()
