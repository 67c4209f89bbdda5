"""The error budget of a bf16 kernel beside eager PyTorch (CONTRIBUTING.md, error budgets)."""

from __future__ import annotations

from happyhorse_fast.budgets import Error

BF16_MAX_RATIO = 2.0
BF16_MEAN_RATIO = 1.5


def bf16_violations(error: Error, eager: Error) -> list[str]:
    """A bf16 kernel against eager PyTorch in bf16 on the same inputs, both measured against float64.

    The allowance is 2x eager's maximum and 1.5x its mean error. A dropped tile or a wrong scale is far past it.
    """
    if not error.finite:
        return ["the result holds NaN or Inf"]
    found = []
    if not error.max_abs <= BF16_MAX_RATIO * eager.max_abs:
        found.append(f"max error {error.max_abs:.3e}, budget {BF16_MAX_RATIO} x eager's {eager.max_abs:.3e}")
    if not error.mean_abs <= BF16_MEAN_RATIO * eager.mean_abs:
        found.append(f"mean error {error.mean_abs:.3e}, budget {BF16_MEAN_RATIO} x eager's {eager.mean_abs:.3e}")
    return found
