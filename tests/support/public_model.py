"""A stand-in for the public implementation's model: its classes' names and habits around seeded weights, CPU only."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse


def get_cp_world_size() -> int:
    """As inference.infra.distributed has it where no group is made."""
    return 0


def ulysses_scheduler() -> Any:
    return SimpleNamespace(size=get_cp_world_size())


class MultiModalityRMSNorm(nn.Module):
    def __init__(self, weight: torch.Tensor, num_modality: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.forward = self.forward_multi_experts if num_modality > 1 else self.forward_single_expert

    def forward_multi_experts(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward_single_expert(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class BaseLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class NativeMoELinear(BaseLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Part(nn.Module):
    """Whatever holds children and has a forward of its own."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError


class Attention(Part):
    pass


class MLP(Part):
    pass


class TransFormerLayer(Part):
    pass


class Adapter(Part):
    pass


class ElementWiseFourierEmbed(nn.Module):
    def __init__(self, bands: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("bands", bands)


class TransformerBlock(nn.Module):
    """``@magi_compile``: its wrapper hides forward on every instance."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        wrapped: Callable[..., Any] = lambda *_: None  # noqa: E731
        self.forward = wrapped
        self._magi_wrapper_installed = True

    def forward(self, *_: Any) -> torch.Tensor:  # type: ignore[no-redef]
        raise NotImplementedError


class DiTModel(nn.Module):
    """The public attributes, from a model of ours; its own forward is not computed here."""

    def __init__(self, like: HappyHorse) -> None:
        super().__init__()
        config = like.config
        self.config = SimpleNamespace(hidden_size=config.hidden_size, params_dtype=torch.float32)
        embedders = {
            f"{name}_embedder": getattr(like.adapter, f"{name}_embedder") for name in ("video", "text", "audio")
        }
        self.adapter = Adapter(**embedders, rope=ElementWiseFourierEmbed(like.adapter.rope.bands))
        self.block = TransformerBlock([_layer(layer, config, i) for i, layer in enumerate(like.block.layers)])
        for name in ("video", "audio"):
            norm = MultiModalityRMSNorm(getattr(like, f"final_norm_{name}").weight.detach(), 1)
            setattr(self, f"final_norm_{name}", norm)
            setattr(self, f"final_linear_{name}", getattr(like, f"final_linear_{name}"))

    def forward(
        self,
        x: torch.Tensor,
        coords_mapping: torch.Tensor,
        modality_mapping: torch.Tensor,
        varlen_handler: Any,
        local_attn_handler: Any,
    ) -> torch.Tensor:
        return torch.zeros(len(x), ulysses_scheduler().size)


def _layer(layer: Any, config: ModelConfig, index: int) -> TransFormerLayer:
    experts = config.experts(index)
    product = NativeMoELinear if experts > 1 else BaseLinear

    def part(module: nn.Module, kind: type[Part]) -> Part:
        return kind(
            **{
                name: MultiModalityRMSNorm(child.weight.detach(), experts)
                if name.endswith("norm")
                else product(child.weight.detach(), experts)
                for name, child in module.named_children()
            }
        )

    attention = part(layer.attention, Attention)
    local = index in config.local_attn_layers
    attention.config = SimpleNamespace(use_local_attn=local, enable_attn_gating=True)  # type: ignore[assignment]
    parts: dict[str, nn.Module] = {"attention": attention, "mlp": part(layer.mlp, MLP)}
    for name in ("attn_post_norm", "mlp_post_norm"):
        if layer.post_norm:
            parts[name] = MultiModalityRMSNorm(getattr(layer, name).weight.detach(), experts)
    return TransFormerLayer(**parts)
