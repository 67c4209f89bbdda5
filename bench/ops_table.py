"""The table of microbenchmarks: a case with a red gate has its reason in place of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.measure.roofline import Peaks
from bench.results import NOT_INTERLEAVED, Json, ratio, refusal
from bench.table import Table

COLUMNS = (
    *("case", "impl", "ms", "spread", "TFLOP/s", "useful", "GB/s", "roofline", "of measured", "MHz", "W"),
    "peers: their time over ours",
)


def row(entry: Json) -> list[str]:
    """A line of the table; a red case has its reason in place of numbers."""
    if (why := refusal(entry)) is not None:
        return [entry["case"], entry["impl"], *"-" * (len(COLUMNS) - 3), why]
    ours = entry["median_ms"]
    spread = f"{(entry['high_ms'] - entry['low_ms']) / ours:.0%}" if "high_ms" in entry else ""
    ratios = {name: ratio(entry, name) for name in entry["peers"]}
    peers = ", ".join(f"{n} {NOT_INTERLEAVED if x is None else f'{x:.2f}x'}" for n, x in ratios.items())
    measured, mhz, watts = (entry.get(name) for name in ("roofline_measured", "sm_mhz", "power_w"))
    flops = [f"{entry[k]:.3g}" if entry.get(k) else "" for k in ("tflops", "tflops_useful")]
    return [
        entry["case"],
        entry["impl"],
        f"{ours:.4g}",
        spread,
        *flops,
        f"{entry['gbps']:.4g}",
        f"{entry['roofline']:.1%}",
        "" if measured is None else f"{measured:.1%}",
        *("" if value is None else f"{value:.0f}" for value in (mhz, watts)),
        peers,
    ]


def table(entries: Iterable[Json]) -> str:
    """Lines with aligned columns."""
    return Table("Microbenchmarks of the ops", COLUMNS, tuple(tuple(row(entry)) for entry in entries)).text()


def summary(peaks: Peaks, measured: Peaks, absent: Mapping[str, str], entries: Sequence[Json]) -> str:
    """The table, what it is a share of, and what is absent."""
    given, here = (
        f"{p.bandwidth:.3g} TB/s, {', '.join(f'{name} {rate:.4g}' for name, rate in p.rates().items())} TFLOP/s"
        for p in (peaks, measured)
    )
    state = "" if measured.sm_mhz is None or measured.power_w is None else (
        f", products at {measured.sm_mhz:.0f} MHz and {measured.power_w:.0f} W"
    )  # fmt: skip
    lines = [
        table(entries),
        "",
        f"roofline: {peaks.source}, {given}; measured here: {here}{state}",
        *(f"absent: {name}: {reason}" for name, reason in sorted(absent.items())),
    ]
    return "\n".join(lines)
