"""Products with their epilogue beside the tensor cores, an implementation of its own: ``"beside"``.

No launch table asks for these kernels. Here launches are passed a configuration that does, so that one run holds them
against the gates and times them in turns with ``"triton"``, the committed kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.cases import Case
from happyhorse_fast.kernels.launch import HOPPER_ARCH, beside_of, config_for, launched_with
from happyhorse_fast.kernels.product_beside import HALF
from happyhorse_fast.ops.linear.contract import ACTIVATIONS
from happyhorse_fast.ops.quantize import FORMATS

BESIDE = "beside"
VARIANTS = {
    "linear": tuple(f"{fmt}_{name}" for fmt in FORMATS.values() for name in ("residual", *ACTIVATIONS)),
    "qkv": tuple(f"qkv_{fmt}" for fmt in FORMATS.values()),
}
"""Launch table -> its entries of which there is such a kernel."""


def fits(case: Case) -> bool:
    """Whether there is such a kernel for a case's op; of QKV for heads of 128 alone."""
    linears = ("fp8_linear_residual", "fp8_linear_activation")
    return case.op in linears or (case.op == "qkv_linear" and case.plan.head_dim == HALF.value)


@contextlib.contextmanager
def running(impl: str) -> Iterator[str]:
    """The backend of an implementation, whose kernels run inside; another backend is as it is."""
    if impl != BESIDE:
        yield impl
        return
    with contextlib.ExitStack() as stack:
        for stem, variants in VARIANTS.items():
            passed = {(name, HOPPER_ARCH): beside_of(config_for(stem, name, HOPPER_ARCH)) for name in variants}
            stack.enter_context(launched_with(stem, passed))
        yield "triton"
