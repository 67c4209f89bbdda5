"""Recorded outputs of the public implementation (commit 209209b), and the recipe that makes their weights and noise.

Each ``.safetensors`` file holds the inputs and outputs of one case; weights and noise are not stored but drawn again,
key by key, from a seeded generator. They ship with the package, so ``happyhorse-fast verify`` proves an installation.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from happyhorse_fast import ambient
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.rotary import frequency_bands

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class GoldenCase:
    """One recorded case.

    Attributes:
        name: File stem, such as ``local_d128_fp32``.
        config: The model's configuration.
        compute_dtype: Rounding that was recorded.
        seed: Of weights and noise.
        tensors: Recorded inputs and outputs by name.
    """

    name: str
    config: ModelConfig
    compute_dtype: torch.dtype
    seed: int
    tensors: dict[str, torch.Tensor]

    def draw(self, name: str, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
        """Standard normal float32 of ``shape``, always the same for a name; also serves as a sampler's ``noise``."""
        return draw(self.seed, name, shape)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The case's weights under the published keys, in the published dtypes."""
        return recipe_weights(self.config, self.seed)

    @ambient.makes_tensors
    def model(self, compute_dtype: torch.dtype | None = None) -> HappyHorse:
        """The eager model with the case's weights, in the recorded or another compute dtype."""
        model = HappyHorse(self.config, compute_dtype or self.compute_dtype)
        model.load_state_dict(self.state_dict())
        return model


def names() -> list[str]:
    """The cases there are."""
    return sorted(p.stem for p in FOLDER.glob("*.safetensors"))


@ambient.makes_tensors
def load_case(name: str) -> GoldenCase:
    """Read one case.

    Raises:
        ValueError: No such case; the message lists those there are.
    """
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"golden case must be one of {', '.join(names())}; got {name!r}")
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
    arch: dict[str, Any] = json.loads(metadata["arch"])
    config = ModelConfig(
        **arch, frame_receptive_field=int(metadata["frf"]), coords_style=json.loads(metadata["coords"])
    )
    dtype: torch.dtype = getattr(torch, metadata["compute_dtype"])
    return GoldenCase(name, config, dtype, int(metadata["seed"]), tensors)


@ambient.makes_tensors
def draw(seed: int, name: str, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """Standard normal float32 on the CPU from the generator that ``seed`` and ``name`` give."""
    generator = torch.Generator().manual_seed(seed * 1000003 + zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator)


@ambient.makes_tensors
def recipe_weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights of any configuration by the recorded recipe: norms 0.2 z, biases 0.1 z, matrices z / sqrt(fan_in)."""
    weights = {}
    for key, like in HappyHorse(config, device="meta").state_dict().items():
        if key == "adapter.rope.bands":
            continue
        z = draw(seed, key, like.shape)
        if "norm" in key:
            value = 0.2 * z
        elif key.endswith("bias"):
            value = 0.1 * z
        else:
            value = (z / like.shape[-1] ** 0.5).bfloat16()
        weights[key] = value.to(like.dtype)
    weights["adapter.rope.bands"] = frequency_bands(config.head_dim)
    return weights
