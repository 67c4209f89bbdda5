"""Shows `attention` in the place of PyTorch's: dense, by a block map, and the tokens of a clip in a frame window.

    python examples/attention.py

It runs in plain torch here; on CUDA tensors the same calls take the kernels.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from happyhorse_fast import BlockMap, Layout, attention


def main() -> None:
    """Print how far each result is from PyTorch's, and how much of the pairs each map computes."""
    noise = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 300, 64, generator=noise).bfloat16()  # [B, Hq, N, D]
    k, v = torch.randn(2, 1, 2, 300, 64, generator=noise).bfloat16()  # [B, Hkv, M, D]
    show("dense", attention(q, k, v), exact(q, k, v, None))

    # Queries 0-149 see keys 0-119, queries 150-299 keys 80-199.
    window = BlockMap.from_ranges([(0, 150), (150, 300)], [(0, 120), (80, 200)], queries=300, keys=300)
    out, lse = attention(q, k, v, block_map=window, return_lse=True)
    show("two ranges", out, exact(q, k, v, window.to_dense()[0]))
    print(f"            LSE {tuple(lse.shape)}, {window.density():.0%} of the pairs")

    # A clip in one sequence: 4 latent frames that see their neighbours; audio and text see, and are seen by, all.
    layout = Layout(frames=4, frame_tokens=60, audio=33, text=27)
    frames = BlockMap.frame_window(layout, receptive_field=1)
    show("frames", attention(q, k, v, block_map=frames), exact(q, k, v, frames.to_dense()[0]))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's attention in float64."""
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)


def show(name: str, out: torch.Tensor, wanted: torch.Tensor) -> None:
    """Print the relative L2 error."""
    print(f"{name:10}: {float((out - wanted).norm() / wanted.norm()):.1e} from float64")


if __name__ == "__main__":
    main()
