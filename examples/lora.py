"""Shows LoRAs: merged exactly before packing, several at once, and taken out again bit for bit.

    python examples/lora.py

`merge_lora` also takes the path of a folder or file of peft, diffusers or kohya.
"""

from __future__ import annotations

import torch

import happyhorse_fast as hh

PATH = "block.layers.0.mlp.down_proj"


def main() -> None:
    """Print how much each LoRA moves the accelerated model's velocity, and whether the weights came back."""
    noise = torch.Generator().manual_seed(0)
    model = hh.HappyHorse(hh.ModelConfig.preset("tiny")).init_weights(seed=0)
    weight = model.get_submodule(PATH).weight
    before = weight.detach().clone()
    inputs = (
        torch.randn(1, 48, 3, 8, 8, generator=noise),
        torch.randn(1, 9, 64, generator=noise),
        torch.randn(1, 5, model.config.text_in_channels, generator=noise),
    )
    plain = velocity(model, *inputs)
    style, voice = lora(weight, noise), lora(weight, noise)
    for name, loras, scales in (("style", [style], [0.001]), ("style and voice", [style, voice], [0.001, 0.0005])):
        hh.merge_lora(model, loras, scales)
        moved = velocity(model, *inputs)  # restore, inside, takes the LoRAs out as well
        print(f"{name}: velocity moved by {float((moved - plain).norm() / plain.norm()):.3f}")
        print(f"weights are what they were: {torch.equal(model.get_submodule(PATH).weight, before)}")


def lora(weight: torch.Tensor, noise: torch.Generator, rank: int = 4) -> dict[str, torch.Tensor]:
    """Random tensors under diffusers' keys: up [out features, r], down [r, in features]."""
    rows, columns = weight.shape
    return {
        f"transformer.{PATH}.lora_A.weight": torch.randn(rank, columns, generator=noise),
        f"transformer.{PATH}.lora_B.weight": torch.randn(rows, rank, generator=noise),
    }


def velocity(model: hh.HappyHorse, *inputs: torch.Tensor) -> torch.Tensor:
    """The video velocity of the accelerated model, which is then eager again."""
    hh.accelerate(model, hh.FastConfig(backend="reference"))
    found, _ = model(*inputs)
    hh.restore(model)
    return found


if __name__ == "__main__":
    main()
