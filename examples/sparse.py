"""Shows block sparsity: what a share of the video pairs costs in error, and which share a map computes.

    python examples/sparse.py

Random weights attend to all keys alike, so this is the hard case; a trained model loses less (examples/pony).
"""

from __future__ import annotations

import torch

import happyhorse_fast as hh


def main() -> None:
    """Print the error of one velocity to the same model without sparsity, for each policy."""
    noise = torch.Generator().manual_seed(0)
    video = torch.randn(1, 48, 4, 32, 32, generator=noise)  # 4 latent frames of 16 x 16 tokens: 8 blocks of 128
    audio = torch.randn(1, 9, 64, generator=noise)
    model = hh.HappyHorse(hh.ModelConfig.preset("tiny")).init_weights(seed=0)
    text = torch.randn(1, 5, model.config.text_in_channels, generator=noise)
    exact = velocity(model, hh.FastConfig(backend="reference"), video, audio, text)
    for sparsity in (hh.TopK(0.5), hh.TopK(0.25), hh.TopP(0.6), hh.Tiles(frames=1, rows=8, columns=16)):
        # exact_first_layers and exact_first_steps leave it out where a model needs that.
        found = velocity(model, hh.FastConfig(sparsity=sparsity, backend="reference"), video, audio, text)
        print(f"{sparsity}: {float((found - exact).norm() / exact.norm()):.3f}")

    layout = hh.Layout(frames=4, frame_tokens=256, audio=9, text=5, align_frames=True, align_modalities=True)
    q = torch.randn(layout.slots, 4, 64, generator=noise).bfloat16()  # [N, Hq, D]
    k = torch.randn(layout.slots, 2, 64, generator=noise).bfloat16()  # [N, Hkv, D]
    chosen = hh.BlockMap.top_k(q, k, layout, 2)  # a map of one's own: 2 of 8 video blocks per row and key head
    print(f"top 2 of 8: {chosen.density():.0%} of the pairs, {chosen.heads} heads")


def velocity(model: hh.HappyHorse, fast: hh.FastConfig, *inputs: torch.Tensor) -> torch.Tensor:
    """The video velocity of one evaluation."""
    hh.accelerate(model, fast)
    found, _ = model(*inputs)
    hh.restore(model)
    return found


if __name__ == "__main__":
    main()
