"""The table of microbenchmarks: a case with a red gate has its reason in place of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.results import Json
from bench.roofline import Peaks

COLUMNS = ("case", "impl", "ms", "spread", "TFLOP/s", "useful", "GB/s", "roofline", "peers: their time over ours")


def row(entry: Json) -> list[str]:
    """A line of the table; a red case has its reason in place of numbers."""
    if not entry["verified"]:
        return [entry["case"], entry["impl"], *"------", f"NOT VERIFIED: {entry['reason']}"]
    ours = entry["median_ms"]
    spread = (entry["high_ms"] - entry["low_ms"]) / ours
    peers = ", ".join(f"{name} {taken / ours:.2f}x" for name, taken in entry["peers"].items())
    flops = [f"{entry[k]:.3g}" if entry["tflops"] else "" for k in ("tflops", "tflops_useful")]
    return [
        entry["case"],
        entry["impl"],
        f"{ours:.4g}",
        f"{spread:.0%}",
        *flops,
        f"{entry['gbps']:.4g}",
        f"{entry['roofline']:.1%}",
        peers,
    ]


def table(entries: Iterable[Json]) -> str:
    """Lines with aligned columns."""
    lines = [list(COLUMNS), *map(row, entries)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS) - 1)]
    return "\n".join(
        "  ".join(
            [
                *(x.ljust(w) for x, w in zip(line[:2], widths[:2], strict=True)),
                *(x.rjust(w) for x, w in zip(line[2:-1], widths[2:], strict=True)),
                line[-1],
            ]
        )
        for line in lines
    )


def summary(peaks: Peaks, measured: Peaks, absent: Mapping[str, str], entries: Sequence[Json]) -> str:
    """The table, what it is a share of, and what is absent."""
    lines = [
        table(entries),
        "",
        f"roofline: {peaks.source}, {peaks.bandwidth:.3g} TB/s, bf16 {peaks.bf16:.4g}"
        + (f", fp8 {peaks.fp8:.4g} TFLOP/s" if peaks.fp8 else " TFLOP/s")
        + f"; measured here: {measured.bandwidth:.3g} TB/s, bf16 {measured.bf16:.4g}"
        + (f", fp8 {measured.fp8:.4g} TFLOP/s" if measured.fp8 else " TFLOP/s"),
        *(f"absent: {name}: {reason}" for name, reason in sorted(absent.items())),
    ]
    return "\n".join(lines)
