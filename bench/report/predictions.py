"""Predictions of kernels' times at 1080p and 5 s, as they were written before they were measured: predictions.csv.

A prediction is a floor, from FLOPs at the tensor cores' peak or bytes at the memory's, or a range where a kernel's own
instructions bound it; docs/notes/hopper.md holds what was learnt from each. Attention and e4m3 products are predicted
twice: the first kernels' outcomes are those of results that name no softmax, and those of no span. Second forms:

- Gluon's attention on a 700 W board. The fast end is about a prototype's rate: bf16 at 305 instructions a step, now
  404; e4m3 q and k in int8's place; e4m3 never added in float32, now every block. The slow end is 5 % below, that of
  e4m3 2 %.
- With int8 q and k beside e4m3 v: e4m3's time on an H200 at 84b4cbf, to 6 % more for 38 instructions of 454.
- The plain kernel without a maximum, from what it took with one on an H200. Where all its parts run one after another,
  of 2048 + 1016 cycles of a tile (products and instructions) 2048 + 846 are left in bf16, 1536 + 1012 with int8.
- The CUDA kernel without a maximum: from what it took with one to 8 % less.
- Other GPUs: from products alone to products and instructions one after another, in the cycles of
  docs/kernels/attention.md.
- A bound found on the device adds 0.25 to 0.4 ms: q, k and v read once, and a launch that finds nothing to do.
- Products: with a scale per row and the residual loaded and stored, down took 7.4 ms and proj 3.1 to 3.3; without them
  the library's products 7.0 and 2.7. Of int8 a bare product in Triton reached 1235, 1247 and 1063 TFLOP/s (up, down and
  qkv with one head a tile), and int8 keeps 92 to 95 % of e4m3's speed. Row codes are bytes at 4.2 TB/s.
- Products with their epilogue beside the tensor cores: 1,076 cycles a slot and 900 for the end of a tile, with half of
  what L2's additions cost the loads of proj taken as hidden. up at the 1455 MHz that it had in turns: its fast end has
  the library's cycles a slot in their place, its slow end in fp8 1,024 more for the sums in shared memory; int8 takes
  what the package did, in turns or alone, less what the epilogue took in fp8.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

SIZE = "1080p-5s"


@dataclass(frozen=True)
class Prediction:
    """The time predicted of one case.

    Attributes:
        case: Name without the size, ``"op-part/precision"``.
        impl: ``"triton"``, ``"hopper"`` or ``"cuda"``.
        ms: Fastest and slowest.
        bound: By what.
        softmax: Form of attention's softmax, as results name it; None of the first kernels, and of other ops.
        form: Of a product's second form, what is new in it. Its outcomes have a span; what was timed alone is older.
        gpus: Of which they are, by their names in `happyhorse_fast.costs`; an H100 and an H200 are one chip under one
            power limit.
    """

    case: str
    impl: str
    ms: tuple[float, float]
    bound: str
    softmax: str | None
    form: str
    gpus: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name of a table's row."""
        return ", ".join(filter(None, (self.case, self.softmax, self.form)))

    @property
    def name(self) -> str:
        """Name of the case in results."""
        kind, _, precision = self.case.partition("/")
        return f"{kind}/{SIZE}/{precision}"


def load(path: Path) -> tuple[Prediction, ...]:
    """Read the predictions of a file, in its order; of a case and kernel the last is of the kernel as it is now."""
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return tuple(
        Prediction(case, impl, (float(low), float(high)), bound, softmax or None, form, tuple(gpus.split()))
        for case, impl, low, high, bound, softmax, form, gpus in rows
    )


PREDICTIONS = load(Path(__file__).with_name("predictions.csv"))
