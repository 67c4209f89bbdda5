"""What the kernels' docstrings predict for an H100 at 1080p and 5 s, before any was measured there.

A prediction is a floor, from FLOPs at the tensor cores' peak or bytes at the memory's, or a range where a kernel's own
instructions bound it. docs/notes/hopper.md holds what was learnt from each.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZE = "1080p-5s"


@dataclass(frozen=True)
class Prediction:
    """Of one case.

    Attributes:
        case: Name without the size, ``"op-part/precision"``.
        impl: ``"triton"``, ``"gluon"`` or ``"cuda"``.
        ms: Fastest and slowest.
        bound: By what.
    """

    case: str
    impl: str
    ms: tuple[float, float]
    bound: str

    @property
    def name(self) -> str:
        """Of the case in results."""
        kind, _, precision = self.case.partition("/")
        return f"{kind}/{SIZE}/{precision}"


def _attention(part: str, tflop: float) -> tuple[Prediction, ...]:
    kind = f"block_sparse_attention-{part}"

    def at(slow: float, fast: float) -> tuple[float, float]:
        return 1e3 * tflop / fast, 1e3 * tflop / slow

    return (
        Prediction(f"{kind}/bf16", "triton", at(487, 530), "products, after the softmax"),
        Prediction(f"{kind}/fp8", "triton", at(487, 650), "products, then exponents"),
        Prediction(f"{kind}/bf16", "gluon", at(570, 650), "products"),
        Prediction(f"{kind}/fp8", "gluon", at(750, 950), "products, exponents, instructions"),
        Prediction(f"{kind}/bf16", "cuda", at(300, 300), "shared memory, then mma.sync"),
    )


PREDICTIONS = (
    *_attention("window", 51.92),
    *_attention("dense", 84.56),
    *_attention("25%", 22.65),
    *_attention("12.5%", 12.33),
    Prediction("fp8_linear_activation-swiglu7/fp8", "triton", (9.11, 9.11), "products"),
    Prediction("fp8_linear_activation-swiglu7/bf16", "triton", (18.2, 18.2), "products"),
    Prediction("fp8_linear_residual-down/fp8", "triton", (4.55, 4.55), "products"),
    Prediction("fp8_linear_residual-down/bf16", "triton", (9.11, 9.11), "products"),
    Prediction("fp8_linear_residual-proj/fp8", "triton", (1.70, 1.70), "products"),
    Prediction("fp8_linear_residual-proj/bf16", "triton", (3.41, 3.41), "products"),
    Prediction("qkv_linear/fp8", "triton", (2.43, 2.43), "products"),
    Prediction("qkv_linear/bf16", "triton", (4.85, 4.85), "products"),
    # Without a branch, as the case is: 4 bytes read, 1 or 2 written per element.
    Prediction("rmsnorm_quantize/fp8", "triton", (0.49, 0.49), "memory"),
    Prediction("rmsnorm_quantize/bf16", "triton", (0.59, 0.59), "memory"),
    Prediction("rmsnorm_quantize/fp8", "cuda", (0.49, 0.49), "memory"),
    Prediction("rmsnorm_quantize/bf16", "cuda", (0.59, 0.59), "memory"),
    # Pooling reads q and k once, 0.12 and 0.25 ms; choosing 0.2 in Triton, 0.08 in CUDA.
    Prediction("select_blocks-25%/fp8", "triton", (0.32, 0.32), "memory, then L2"),
    Prediction("select_blocks-25%/bf16", "triton", (0.45, 0.45), "memory, then L2"),
    Prediction("select_blocks-25%/fp8", "cuda", (0.20, 0.20), "memory"),
    Prediction("select_blocks-25%/bf16", "cuda", (0.33, 0.33), "memory"),
)
