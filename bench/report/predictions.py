"""Predictions of kernels' times at 1080p and 5 s, written before they were measured.

A prediction is a floor, from FLOPs at the tensor cores' peak or bytes at the memory's, or a range where a kernel's own
instructions bound it. docs/notes/hopper.md holds what was learnt from each. Attention and e4m3 products are predicted
twice: the first kernels' outcomes are those of results that name no softmax, and those of no span.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.inputs import BOUNDED, FOUND, RUNNING
from happyhorse_fast.costs import GPUS

SIZE = "1080p-5s"
HOPPER = ("h100", "h200")
"""GPUs that predictions for an H100 are of: one chip under one power limit."""


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
        gpus: Of which they are, by their names in `happyhorse_fast.costs`.
    """

    case: str
    impl: str
    ms: tuple[float, float]
    bound: str
    softmax: str | None = None
    form: str = ""
    gpus: tuple[str, ...] = HOPPER

    @property
    def label(self) -> str:
        """Name of a table's row."""
        return ", ".join(filter(None, (self.case, self.softmax, self.form)))

    @property
    def name(self) -> str:
        """Name of the case in results."""
        kind, _, precision = self.case.partition("/")
        return f"{kind}/{SIZE}/{precision}"


TFLOP = {"window": 51.92, "dense": 84.56, "25%": 22.65, "12.5%": 12.33}
"""Work of attention by its mask, in whole blocks."""
Rates = tuple[float, float]
"""TFLOP/s, slowest and fastest."""
# Gluon's second forms on a 700 W board. The fast end is about a prototype's: bf16 at 305 instructions a step, now 404;
# e4m3 q and k in int8's place; e4m3 never added in float32, now every block. The slow end is 5 % below, e4m3's 2 %.
SECOND: dict[str, dict[str, Rates]] = {
    "bf16": {"dense": (690, 726), "25%": (678, 714), "window": (684, 720)},
    "int8_qk": {"dense": (750, 800), "25%": (825, 868), "window": (767, 807)},
    "fp8": {"dense": (780, 800), "25%": (833, 850), "window": (810, 827)},
}
# The CUDA kernel without a maximum: from what it had with one, measured dense, to 8 % more.
CUDA = (316, 340)
# The plain kernel with a running maximum, measured on an H200. Where all its parts run one after another, products and
# instructions (2048 + 1016 cycles of a tile in bf16), without a maximum 2048 + 846 are left, with int8 1536 + 1012.
PLAIN: dict[str, float] = {"dense": 508, "25%": 514, "12.5%": 501, "window": 512}
LESS = {"bf16": (2048 + 846) / (2048 + 1016), "int8_qk": (1536 + 1012) / (2048 + 1016)}
# Elsewhere nothing is measured: from products alone to products and instructions one after another. Cycles of an SM for
# a tile, bounded (docs/kernels/attention.md).
CYCLES: dict[str, dict[str, tuple[int, int]]] = {
    "a100": {"bf16": (4096, 2168), "int8_qk": (3072, 2032)},
    "rtx4090": {"bf16": (16384, 2168), "int8_qk": (10240, 1968)},
    "rtx5090": {"bf16": (16384, 1904), "int8_qk": (10240, 1856)},
}
FINDING = (0.25, 0.4)
"""ms that finding the bound on the device adds: q, k and v read once, and a launch that finds nothing to do."""


def _at(part: str, slow: float, fast: float) -> tuple[float, float]:
    """Milliseconds at rates."""
    return 1e3 * TFLOP[part] / fast, 1e3 * TFLOP[part] / slow


def _second() -> Iterator[Prediction]:
    """Attention with a bounded softmax, and in e4m3 with v's scale in P."""
    for part in TFLOP:
        kind = f"block_sparse_attention-{part}"
        for fmt, rates in SECOND.items():
            form = RUNNING if fmt == "fp8" else BOUNDED
            if part in rates:
                yield Prediction(
                    f"{kind}/{fmt}", "hopper", _at(part, *rates[part]), "power; the prototype's rate", form
                )
        before = PLAIN[part]
        for fmt, less in LESS.items():
            low = before if fmt == "bf16" else before / LESS["bf16"]
            bound = "products, then instructions"
            yield Prediction(f"{kind}/{fmt}", "triton", _at(part, low, before / less), bound, BOUNDED)
        yield Prediction(f"{kind}/bf16", "cuda", _at(part, *CUDA), "shared memory, then mma.sync", BOUNDED)
    low, high = _at("dense", *SECOND["bf16"]["dense"])
    taken = low + FINDING[0], high + FINDING[1]
    yield Prediction("attention-dense/bf16", "hopper", taken, "as with a known bound", f"{BOUNDED}{FOUND}")
    for gpu, formats in CYCLES.items():
        for part, (fmt, (products, instructions)) in ((p, item) for p in TFLOP for item in formats.items()):
            floor = 1e15 * TFLOP[part] / GPUS[gpu].rate(fmt)
            taken = floor, floor * (1 + instructions / products)
            name = f"block_sparse_attention-{part}/{fmt}"
            yield Prediction(name, "triton", taken, "products, then instructions", BOUNDED, gpus=(gpu,))


ONE_SCALE = "one scale, the memory adds"
TWO_HEADS = "two heads a tile"


def _products() -> Iterator[Prediction]:
    """Second forms of e4m3 and bf16 products, and int8.

    With a scale per row and the residual loaded and stored, down took 7.4 ms and proj 3.1 to 3.3; without them the
    library's products 7.0 and 2.7. Of int8 a bare product in Triton reached 1235, 1247 and 1063 TFLOP/s (up, down and
    qkv with one head a tile), and int8 keeps 92 to 95 % of e4m3's speed. Row codes are bytes at 4.2 TB/s.
    """
    for case, ms, form in (
        ("fp8_linear_residual-down/fp8", (7.2, 7.4), ONE_SCALE),
        ("fp8_linear_residual-proj/fp8", (2.9, 3.1), ONE_SCALE),
        ("qkv_linear/fp8", (4.0, 4.0), TWO_HEADS),
        ("qkv_linear/bf16", (7.6, 7.6), TWO_HEADS),
        ("fp8_linear_activation-swiglu7/int8", (14.6, 15.7), ""),
        ("fp8_linear_residual-down/int8", (7.2, 7.8), ""),
        ("fp8_linear_residual-proj/int8", (3.0, 3.2), ""),
        ("qkv_linear/int8", (4.2, 4.5), ""),
    ):
        yield Prediction(case, "triton", ms, "power; products measured on an H200", form=form)
    for part, floor in (("proj", 0.24), ("down", 0.63)):
        yield Prediction(f"quantize_rows-{part}/int8", "triton", (floor, floor), "memory")


def _first(part: str) -> tuple[Prediction, ...]:
    kind = f"block_sparse_attention-{part}"

    def at(slow: float, fast: float) -> tuple[float, float]:
        return _at(part, slow, fast)

    return (
        Prediction(f"{kind}/bf16", "triton", at(487, 530), "products, after the softmax"),
        Prediction(f"{kind}/fp8", "triton", at(487, 650), "products, then exponents"),
        Prediction(f"{kind}/bf16", "hopper", at(570, 650), "products"),
        Prediction(f"{kind}/fp8", "hopper", at(750, 950), "products, exponents, instructions"),
        Prediction(f"{kind}/bf16", "cuda", at(300, 300), "shared memory, then mma.sync"),
    )


PREDICTIONS = (
    *(prediction for part in TFLOP for prediction in _first(part)),
    *_second(),
    Prediction("fp8_linear_activation-swiglu7/fp8", "triton", (9.11, 9.11), "products"),
    Prediction("fp8_linear_activation-swiglu7/bf16", "triton", (18.2, 18.2), "products"),
    Prediction("fp8_linear_residual-down/fp8", "triton", (4.55, 4.55), "products"),
    Prediction("fp8_linear_residual-down/bf16", "triton", (9.11, 9.11), "products"),
    Prediction("fp8_linear_residual-proj/fp8", "triton", (1.70, 1.70), "products"),
    Prediction("fp8_linear_residual-proj/bf16", "triton", (3.41, 3.41), "products"),
    Prediction("qkv_linear/fp8", "triton", (2.43, 2.43), "products"),
    Prediction("qkv_linear/bf16", "triton", (4.85, 4.85), "products"),
    *_products(),
    # Without a branch, as the case is: 4 bytes read, 1 or 2 written per element.
    Prediction("rmsnorm_quantize/fp8", "triton", (0.49, 0.49), "memory"),
    Prediction("rmsnorm_quantize/bf16", "triton", (0.59, 0.59), "memory"),
    Prediction("rmsnorm_quantize/fp8", "cuda", (0.49, 0.49), "memory"),
    Prediction("rmsnorm_quantize/bf16", "cuda", (0.59, 0.59), "memory"),
    # Pooling reads q and k once, 0.12 and 0.25 ms; choosing 0.2 in Triton, 0.08 in CUDA.
    Prediction("select_blocks-25%/fp8", "triton", (0.32, 0.32), "memory, then L2"),
    Prediction("select_blocks-25%/bf16", "triton", (0.45, 0.45), "memory, then L2"),
    # As measured in e4m3 on an H200: the same bytes, but for 10 MB of scales.
    Prediction("select_blocks-25%/int8_qk", "triton", (0.56, 0.60), "memory, then L2"),
    Prediction("select_blocks-25%/int8_qk", "cuda", (0.33, 0.36), "memory"),
    Prediction("select_blocks-25%/fp8", "cuda", (0.20, 0.20), "memory"),
    Prediction("select_blocks-25%/bf16", "cuda", (0.33, 0.33), "memory"),
)
