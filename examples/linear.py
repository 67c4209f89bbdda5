"""Shows the products in bf16, int8 and fp8: pack a weight, quantise activations, multiply, and compare with float32.

    python examples/linear.py

Rows of two experts lie in one tensor; `row_tiles` says which rows are whose. backend="triton" on a GPU.
"""

from __future__ import annotations

import torch

from happyhorse_fast.ops import fp8_linear, pack_linear
from happyhorse_fast.ops.quantize import e4m3_rows, int8_rows


def main() -> None:
    """Print the relative L2 error of each format's product to float32's."""
    noise = torch.Generator().manual_seed(0)
    rows, inputs, features = 300, 256, 512
    x = torch.randn(rows, inputs, generator=noise)
    weight = torch.randn(2 * features, inputs, generator=noise) * inputs**-0.5  # two experts, one below the other
    # (expert, first row, end row): at most 128 rows each.
    row_tiles = torch.tensor([(0, 0, 128), (0, 128, 200), (1, 200, 300)], dtype=torch.int32)
    exact = torch.cat([x[:200] @ weight[:features].T, x[200:] @ weight[features:].T])

    activations = {"bf16": (x.bfloat16(), None), "int8": int8_rows(x), "fp8": e4m3_rows(x)}  # codes, a scale per row
    for precision, (codes, x_scale) in activations.items():
        packed, weight_scale = pack_linear(weight, experts=2, to=precision)
        y = fp8_linear(codes, x_scale, packed, weight_scale, row_tiles, backend="reference")
        error = float((y - exact).norm() / exact.norm())
        print(f"{precision}: weights {packed.dtype}, {packed.nbytes} bytes, error {error:.1e}")


if __name__ == "__main__":
    main()
