"""Transformers of diffusers' own classes in bf16, a layer or two of heads of 32, random weights, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch

Inputs = dict[str, object]


@dataclass(frozen=True)
class Tiny:
    """A model's class, its sizes, its inputs, and how many attention calls of a forward pass fit and do not."""

    kind: str
    sizes: dict[str, object]
    inputs: Callable[[], Inputs]
    taken: int
    left: int = 0

    def model(self) -> torch.nn.Module:
        model = getattr(diffusers, self.kind)(**self.sizes)
        for name, parameter in model.named_parameters():  # as initialised some outputs are 0
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.1)
        return model.bfloat16().eval().requires_grad_(False)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}


def wan() -> Inputs:
    return {
        "hidden_states": noise(1, 4, 3, 12, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 7, 16),
    }


def ltx2() -> Inputs:
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    return {
        "hidden_states": noise(2, 150, 8),
        "audio_hidden_states": noise(2, 10, 8),
        "encoder_hidden_states": noise(2, 7, 64),
        "audio_encoder_hidden_states": noise(2, 7, 64),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 3,
        "height": 5,
        "width": 10,
        "audio_num_frames": 10,
    }


def hunyuan() -> Inputs:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    return {
        "hidden_states": noise(2, 4, 3, 12, 16),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": noise(2, 9, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]).bfloat16(),
    }


def flux() -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(10), torch.arange(14), indexing="ij")
    return {
        "hidden_states": noise(1, 140, 8),
        "encoder_hidden_states": noise(1, 7, 16),
        "pooled_projections": noise(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros(140), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(7, 3),
    }


def qwen() -> Inputs:
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    return {
        "hidden_states": noise(2, 140, 8),
        "encoder_hidden_states": noise(2, 9, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, 10, 14)], [(1, 10, 14)]],
    }


TINY = {
    "Wan": Tiny(
        "WanTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2},
        wan,
        taken=4,
    ),
    "LTX-2": Tiny(
        "LTX2VideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 64,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 32,
            "audio_cross_attention_dim": 64,
            "num_layers": 1,
            "caption_channels": 64,
        },
        ltx2,
        taken=4,
        left=2,
    ),
    "HunyuanVideo": Tiny(
        "HunyuanVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (8, 12, 12),
        },
        hunyuan,
        taken=2,
    ),
    "Flux": Tiny(
        "FluxTransformer2DModel",
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (8, 12, 12),
        },
        flux,
        taken=2,
    ),
    "Qwen-Image": Tiny(
        "QwenImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 12, 12),
        },
        qwen,
        taken=2,
    ),
}
