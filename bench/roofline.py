"""What the machine can do: datasheet peaks by the GPU's name, and ceilings measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases import FULL_SIZES, SMALL_SIZE, Case, cases_of
from bench.timing import Stopwatch
from happyhorse_fast.costs import GPUS

# Products of the 15B model whose shapes the library is measured at; the better one is the ceiling.
_SHAPES = ("qkv", "up")
COPY_BYTES = 4 << 30
CPU_COPY_BYTES = 128 << 20


@dataclass(frozen=True)
class Peaks:
    """Rates of one machine.

    Attributes:
        bandwidth: Memory, TB/s, bytes read plus bytes written.
        bf16: TFLOP/s.
        fp8: TFLOP/s, None where there is none.
        source: ``"measured"``, or where the maker states them.
    """

    bandwidth: float
    bf16: float
    fp8: float | None
    source: str

    def floor_ms(self, flops: float, moved: float, precision: str) -> float:
        """Least time for so many FLOPs and bytes."""
        rate = self.fp8 if precision == "fp8" and self.fp8 is not None else self.bf16
        return 1e3 * max(flops / (rate * 1e12), moved / (self.bandwidth * 1e12))


def datasheet(device: torch.device) -> Peaks | None:
    """The maker's numbers, None for a device that is not in ``happyhorse_fast.costs``."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    for gpu in GPUS.values():
        if gpu.name in name:
            return Peaks(gpu.bandwidth, gpu.bf16, gpu.fp8, gpu.source)
    return None


def measured(device: torch.device, stopwatch: Stopwatch, *, seconds: float = 0.5) -> Peaks:
    """A large copy, and the library's bf16 and row-wise fp8 products at the model's shapes."""
    size = COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    copied = stopwatch.time([large_copy(size, device)], seconds=seconds).median_ms
    on = FULL_SIZES[0] if device.type == "cuda" else SMALL_SIZE
    case = next(c for c in cases_of(on) if c.op == "qkv_linear")
    best = {
        name: _best(case, maker, stopwatch, seconds) for name, maker in (("bf16", bf16_product), ("fp8", fp8_product))
    }
    return Peaks(2 * size / copied / 1e9, best["bf16"] or 0.0, best["fp8"], "measured")


def _best(case: Case, maker: Callable[..., Callable[[], object]], stopwatch: Stopwatch, seconds: float) -> float | None:
    rates = []
    for name in _SHAPES:
        _, features, inputs = case.weight_shape(name)
        try:
            call = maker(case.rows, features, inputs, stopwatch.device)
            taken = stopwatch.time([call], seconds=seconds, graph=False).median_ms
        except (RuntimeError, NotImplementedError, ValueError):  # no fp8 on this device
            return None
        rates.append(2.0 * case.rows * features * inputs / taken / 1e9)
    return max(rates)


def large_copy(size: int, device: torch.device) -> Callable[[], object]:
    """A copy of so many bytes of random data to another place."""
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bf16_product(rows: int, features: int, inputs: int, device: torch.device) -> Callable[[], object]:
    """x . weight through torch, random data: zeros ran 13 % faster on an H200."""
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=device)
    weight = torch.randn(features, inputs, dtype=torch.bfloat16, device=device)
    return lambda: x @ weight.T


def fp8_product(rows: int, features: int, inputs: int, device: torch.device) -> Callable[[], object]:
    """The same in e4m3 with a scale per row and per output channel, ``torch._scaled_mm``.

    Raises:
        RuntimeError: The device is a CPU, whose e4m3 product is not a ceiling of anything here.
    """
    if device.type != "cuda":
        raise RuntimeError("row-wise e4m3 products need a GPU")
    x = torch.randn(rows, inputs, device=device).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    weight = torch.randn(features, inputs, device=device).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    x_scale, weight_scale = torch.ones(rows, 1, device=device), torch.ones(1, features, device=device)
    return lambda: torch._scaled_mm(
        x, weight.T, scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
