"""Plan of one layer of the fast model: its sizes, and the precision and implementation of each product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from happyhorse_fast.config import OPS, ModelConfig
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.ops.runtime.dispatch import Choice


@dataclass(frozen=True)
class LayerPlan:
    """Kind and sizes of a layer, and how each of its products runs.

    Attributes:
        index: Layer number.
        experts: 1 or 3.
        gated: SwiGLU7 rather than GELU7.
        local: Whether the layer belongs to ``local_attn_layers``.
        sparse: Whether a sparsity policy applies to it, at the denoising steps where it may.
        num_heads_q: Hq.
        num_heads_kv: Hkv.
        head_dim: D.
        precision: ``"bf16"``, ``"int8"`` or ``"fp8"`` for each of ``OPS``; of attention one of `quantize.ATTENTION`.
        backend: ``"triton"``, ``"cuda"`` or ``"reference"`` for each op stem's function.
    """

    index: int
    experts: int
    gated: bool
    local: bool
    sparse: bool
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    precision: Mapping[str, str]
    backend: Mapping[str, str]

    @classmethod
    def of(cls, config: ModelConfig, fast: FastConfig, layer: int, choices: Mapping[str, Choice]) -> LayerPlan:
        """The plan of one layer of a model."""
        return cls(
            layer,
            config.experts(layer),
            layer not in config.gelu7_layers,
            layer in config.local_attn_layers,
            fast.is_sparse(layer, config.num_layers),
            config.num_heads_q,
            config.num_heads_kv,
            config.head_dim,
            {op: fast.precision_of(op, layer) for op in OPS},
            {op: choice.backend for op, choice in choices.items()},
        )
