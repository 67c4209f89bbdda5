"""Error budgets: one set of functions for tests, the self-check and reports.

Every budget is held per tile of 128 x 128 as well as globally: a zeroed tile of a 4096 x 4096 result passes every usual
global gate (cosine 0.9995), and so does a scale that is 4 % off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TILE = 128
GEMM_DISTANCE = 1e-5
GEMM_SLOPE = 2e-3
ATTENTION_DISTANCE_QUANTISED_P = 1e-5
ATTENTION_DISTANCE_EXACT_P = 1e-3
# A GPU's verdict on attention with P and v in e4m3; on exact arithmetic the 1e-5 above holds. Hopper adds e4m3 products
# with 13 fraction bits (arXiv 2412.19437, 3.5.2; arXiv 2411.10958), so that scores are off by 5e-4, and P takes another
# code where it was near a boundary: 5.0e-5 on the self-check's inputs, 2.5e-4 where the result becomes e4m3 too
# (tests/emulators/test_wgmma_accumulator.py). Twice that; a scale that is 4 % off is 7.7e-4.
ATTENTION_DISTANCE_TENSOR_CORE = 1e-4
ATTENTION_DISTANCE_TENSOR_CORE_E4M3_OUT = 5e-4


@dataclass(frozen=True)
class Error:
    """Distance between a result and its reference.

    Attributes:
        relative_l2: ||x - y|| / ||y||.
        max_abs: Largest absolute difference.
        mean_abs: Mean absolute difference.
        tile_distance: Worst 128 x 128 tile of 1 - 2<x, y> / (|x|^2 + |y|^2); 1 for a dropped tile, 8e-4 for 4 %.
        tile_slope: Worst tile of |<x, y> / <y, y> - 1|.
        finite: Whether the result has no NaN or Inf.
    """

    relative_l2: float
    max_abs: float
    mean_abs: float
    tile_distance: float
    tile_slope: float
    finite: bool


def measure(result: torch.Tensor, reference: torch.Tensor) -> Error:
    """Compare in float64; trailing dimensions are flattened to [rows, columns] and cut into tiles of 128 x 128.

    Args:
        result: [rows, ...].
        reference: The same shape, usually float64.

    Raises:
        ValueError: The shapes differ.
    """
    import torch

    if result.shape != reference.shape:
        raise ValueError(f"result must have the reference's shape {list(reference.shape)}, got {list(result.shape)}")
    x, y = (
        t.detach().double().reshape(t.shape[0], -1) if t.dim() > 1 else t.detach().double()[None]
        for t in (result, reference)
    )
    if not bool(torch.isfinite(x).all()):
        return Error(float("inf"), float("inf"), float("inf"), float("inf"), float("inf"), finite=False)
    difference = (x - y).abs()
    norm = float(y.norm())
    xy, xx, yy = (_tile_sums(t) for t in (x * y, x * x, y * y))
    total = xx + yy
    nonzero = total > 0
    distance = (1 - 2 * xy / total.clamp_min(1e-300)).where(nonzero, torch.zeros_like(total))
    slope = (xy / yy.clamp_min(1e-300) - 1).abs().where(nonzero, torch.zeros_like(total))
    return Error(
        relative_l2=float((x - y).norm()) / norm if norm else float("inf") if float(x.norm()) else 0.0,
        max_abs=float(difference.max()) if difference.numel() else 0.0,
        mean_abs=float(difference.mean()) if difference.numel() else 0.0,
        tile_distance=max(0.0, float(distance.max())),
        tile_slope=float(slope.max()),
        finite=True,
    )


def _tile_sums(x: torch.Tensor) -> torch.Tensor:
    import torch

    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % TILE, 0, -rows % TILE))
    return padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).sum(dim=(1, 3))


def violations(error: Error, *, distance: float = GEMM_DISTANCE, slope: float | None = GEMM_SLOPE) -> list[str]:
    """What is past its budget, as sentences with the measured number; empty where all hold.

    Args:
        error: From :func:`measure`.
        distance: Allowed worst-tile distance.
        slope: Allowed worst-tile slope error, None where it does not apply.
    """
    if not error.finite:
        return ["the result holds NaN or Inf"]
    found = []
    if not error.tile_distance <= distance:
        found.append(f"worst tile distance {error.tile_distance:.3e}, budget {distance:.1e}")
    if slope is not None and not error.tile_slope <= slope:
        found.append(f"worst tile slope error {error.tile_slope:.3e}, budget {slope:.1e}")
    return found
