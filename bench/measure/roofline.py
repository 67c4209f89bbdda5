"""Ceilings of the machine: datasheet peaks by the GPU's name, and those measured in the same run."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import torch

from bench.cases import FULL_SIZES, SMALL_SIZE, cases_of
from bench.measure.conditions import Monitor
from bench.measure.timing import Call, Stopwatch
from happyhorse_fast.costs import GPUS, Gpu, rate_of

MEASURED = "measured"
"""Source of ceilings that are not a maker's."""
COPY_BYTES = 4 << 30
CPU_COPY_BYTES = 128 << 20


@dataclass(frozen=True)
class Peaks:
    """Rates of one machine.

    Attributes:
        bandwidth: Memory, TB/s, bytes read plus bytes written.
        bf16: TFLOP/s.
        fp8: TFLOP/s, None where there is none.
        source: :data:`MEASURED`, or where the maker states them.
        sm_mhz: Clock that the products were measured at, None where it is not known.
        power_w: Power, likewise.
        int8: TOP/s; None where that is not known: then as fp8, whose datasheet rate it has on Hopper.
    """

    bandwidth: float
    bf16: float
    fp8: float | None
    source: str
    sm_mhz: float | None = None
    power_w: float | None = None
    int8: float | None = None

    def rate(self, precision: str) -> float:
        """TFLOP/s in ``"bf16"``, ``"int8"``, ``"fp8"`` or a format of attention; without 8 bits that of bf16."""
        fp8 = self.fp8 or self.bf16
        rate = rate_of(precision, {"bf16": self.bf16, "int8": self.int8 or fp8, "fp8": fp8})
        assert rate is not None
        return rate

    def rates(self) -> dict[str, float]:
        """TFLOP/s by format, those that are known."""
        known = {"bf16": self.bf16, "int8": self.int8, "fp8": self.fp8}
        return {name: rate for name, rate in known.items() if rate}

    def share(self, tflops: float, gbps: float, precision: str) -> float:
        """Share that is reached of the products' rate or of the bandwidth, whichever binds."""
        return max(tflops / self.rate(precision), gbps / 1e3 / self.bandwidth)


def gpu_named(name: str) -> Gpu | None:
    """The card that a driver's name of it means; None for one that is not in ``happyhorse_fast.costs``."""
    short = name.lower().replace(" ", "")
    return next((gpu for gpu in GPUS.values() if gpu.name in short), None)


def measured(stopwatch: Stopwatch, *, seconds: float = 0.5, monitor: Monitor | None = None) -> Peaks:
    """A large copy, and the library's products in all formats at the model's shapes in turns, on a warm chip.

    The library's int8 product is no ceiling where ours is faster, as on an H200, but it is the one that always runs.

    Args:
        stopwatch: Times them, on its device.
        seconds: About how long each is repeated; on a GPU spans are a second at least, 0 on a CPU is one call.
        monitor: Knows the clock and power that the products ran at.
    """
    device, on_gpu = stopwatch.device, stopwatch.on_gpu
    size = COPY_BYTES if on_gpu else CPU_COPY_BYTES
    copy = stopwatch.prepare([large_copy(size, device)], dry=not seconds)
    copied = stopwatch.compare({"copy": copy}, seconds).timings["copy"].median_ms
    case = next(c for c in cases_of(FULL_SIZES[0] if on_gpu else SMALL_SIZE) if c.op == "qkv_linear")
    prepared = {}
    makers = (("bf16", bf16_product), ("fp8", fp8_product), ("int8", int8_product))
    # The better of two products of the 15B model is the ceiling; a CPU's of 8 bits are none of anything here.
    for (precision, maker), name in itertools.product(makers if on_gpu else makers[:1], ("qkv", "up")):
        _, features, inputs = case.weight_shape(name)
        try:
            call = maker(case.rows, features, inputs, device)
            prepared[precision, 2.0 * case.rows * features * inputs] = stopwatch.prepare([call], dry=not seconds)
        except (RuntimeError, ValueError) as error:  # such as no 8 bits on this device
            print(f"no ceiling of products in {precision}, of {name}: {error}", file=sys.stderr, flush=True)
    products = stopwatch.compare(prepared, seconds)
    rates: dict[str, float] = {}
    for (precision, flops), timing in products.timings.items():
        rates[precision] = max(rates.get(precision, 0.0), flops / timing.median_ms / 1e9)
    state = monitor.during(products.began, products.ended) if monitor else {}
    clock, power = state.get("sm_mhz"), state.get("power_w")
    return Peaks(2 * size / copied / 1e9, rates["bf16"], rates.get("fp8"), MEASURED, clock, power, rates.get("int8"))


def large_copy(size: int, device: torch.device) -> Call:
    """A copy of so many bytes of random data to another place."""
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bf16_product(rows: int, features: int, inputs: int, device: torch.device) -> Call:
    """x . weight through torch, random data: zeros ran 13 % faster on an H200."""
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=device)
    weight = torch.randn(features, inputs, dtype=torch.bfloat16, device=device)
    return lambda: x @ weight.T


def fp8_product(rows: int, features: int, inputs: int, device: torch.device) -> Call:
    """The same in e4m3 with a scale per row and per output channel, ``torch._scaled_mm``."""
    x = torch.randn(rows, inputs, device=device).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    weight = torch.randn(features, inputs, device=device).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    x_scale, weight_scale = torch.ones(rows, 1, device=device), torch.ones(1, features, device=device)
    return lambda: torch._scaled_mm(
        x, weight.T, scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def int8_product(rows: int, features: int, inputs: int, device: torch.device) -> Call:
    """The same of int8 codes, without scales, ``torch._int_mm``: int32 out."""
    x, weight = (
        torch.randn(n, inputs, device=device).mul_(32).round_().clamp_(-127, 127).to(torch.int8)
        for n in (rows, features)
    )
    return lambda: torch._int_mm(x, weight.T)
