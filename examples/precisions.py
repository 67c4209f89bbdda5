"""Shows `accelerate`: one velocity of a small model, eager and packed in bf16, int8 and fp8, and the error of each.

    python examples/precisions.py

On a GPU: model.cuda() and backend="auto", which takes the fastest kernel that passes its self-check.
"""

from __future__ import annotations

import torch

import happyhorse_fast as hh


def main() -> None:
    """Print the relative L2 error of each form's velocity to eager float32, and what ran in the last."""
    noise = torch.Generator().manual_seed(0)
    video = torch.randn(1, 48, 3, 8, 8, generator=noise)  # [1, C, T, H, W]
    audio = torch.randn(1, 9, 64, generator=noise)  # [1, A, 64]
    config = hh.ModelConfig.preset("tiny")
    text = torch.randn(1, 5, config.text_in_channels, generator=noise)  # [1, L, Ct]

    with torch.no_grad():
        exact, _ = hh.HappyHorse(config, torch.float32).init_weights(seed=0)(video, audio, text)
        model = hh.HappyHorse(config).init_weights(seed=0)  # in bf16; or hh.load(folder, preset=...)
        print(f"eager bf16: {error(model(video, audio, text)[0], exact):.1e}")
        for precision in ("bf16", "int8", "fp8"):
            hh.accelerate(model, hh.FastConfig(precision=precision, backend="reference"))
            print(f"fast {precision}: {error(model(video, audio, text)[0], exact):.1e}")
            last = hh.explain(model)[0]
            hh.restore(model)  # the weights it had, bit for bit
    print(last)


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2."""
    return float((result - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
