"""One layer of the fast model: packed weights, and seven launches, in int8 nine, over padded rows (docs/OPS.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from happyhorse_fast.arguments import listed
from happyhorse_fast.config import OPS
from happyhorse_fast.eager.qkv import rms_norm
from happyhorse_fast.fast.attention import UNKNOWN, AttentionBound, AttentionInputs, Operand
from happyhorse_fast.fast.attention_over_ranks import attention_over_ranks
from happyhorse_fast.fast.clip_state import ClipState
from happyhorse_fast.fast.plan import LayerPlan
from happyhorse_fast.ops import (
    block_sparse_attention,
    fp8_linear,
    fp8_linear_activation,
    fp8_linear_residual,
    qkv_linear,
    quantize_rows,
    rmsnorm_quantize,
)
from happyhorse_fast.ops.attention.score_bound import norm_scores, value_bound
from happyhorse_fast.ops.linear.packing import pack_linear
from happyhorse_fast.ops.qkv.packing import pack_qk_norm, pack_qkv_weight, static_qk_scale
from happyhorse_fast.ops.quantize import DTYPES, dequantize

_FEATURE_TILE = 128


class FastLayer(nn.Module):
    """Packed weights of one layer, as buffers, and its forward pass.

    Made by :func:`pack_layer`; the buffers' names and dtypes are the packed checkpoint's format.

    Attributes:
        plan: What the layer is, and how it runs.
        bound: How large its scores and values can be; unknown until there are weights.
    """

    attn_norm: torch.Tensor
    mlp_norm: torch.Tensor
    qk_norm: torch.Tensor
    qk_scale: torch.Tensor
    qkv_weight: torch.Tensor

    def __init__(self, plan: LayerPlan, buffers: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.plan = plan
        self.bound: AttentionBound = UNKNOWN
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def find_bound(self) -> None:
        """Set :attr:`bound` from the weights; call it after changing a buffer in place. Waits for the device.

        In e4m3 a row of x is off by at most 2^-4, and :data:`score_bound.MARGIN` covers that too, as it does half a
        step of int8 where a row's largest value is at most 17 times its RMS; the weights are taken as their codes stand
        for.
        """
        if self.qkv_weight.is_meta:
            return
        plan = self.plan
        start = (plan.num_heads_q + plan.num_heads_kv) * plan.head_dim
        v_rows = slice(start, start + plan.num_heads_kv * plan.head_dim)
        weights, scales = self.weight_of("qkv")[:, v_rows], self.scale_of("qkv")
        of_experts = []
        for e in range(plan.experts):  # one at a time: in float32 one of the 15B model's is 21 MB
            weight = weights[e : e + 1] if scales is None else dequantize(weights[e : e + 1], scales[e : e + 1, v_rows])
            of_experts.append(value_bound(self.attn_norm[e : e + 1], weight))
        v_max = float(torch.tensor(of_experts, dtype=torch.float64).max())  # NaN where one is; Python's max may drop it
        self.bound = AttentionBound(norm_scores(self.qk_norm[:, 0], self.qk_norm[:, 1]), v_max)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Carry out ``nn.Module.to`` and the like; raise a TypeError where a tensor's dtype would change."""
        require_kept_dtypes(self, fn)
        return super()._apply(fn, recurse)

    def forward(self, hidden: torch.Tensor, state: ClipState, rows_in_mlp: int | None, *, exact: bool = False) -> None:
        """Update the residual stream in place.

        Args:
            hidden: [rows, C] float32, the padded sequence.
            state: What depends on the clip only: row tiles, rotary phases, block maps.
            rows_in_mlp: Rows that are in the MLP at once, a multiple of 128, or None for all.
            exact: Whether a sparsity policy does not apply at this denoising step.
        """
        # One name for what the next launch reads: an input is freed as soon as its result is there.
        tiles = state.row_tiles(self.plan.experts)
        x: Any
        x = self.norm(hidden, "qkv", tiles)
        x = self.qkv(x, state.cos_sin, tiles)
        if state.ulysses is None:
            x = self.attend(x, state, exact=exact)
        else:
            attend = partial(self.attend, state=state, exact=exact)
            x = list(x)  # which is emptied there: what was sent is freed as it goes
            x = attention_over_ranks(x, state.ulysses, attend, fp8_out=self.plan.precision["proj"] == "fp8")
        x = self.quantized(x, "proj")
        self.add(hidden, x, "proj", tiles)
        del x
        step = rows_in_mlp or hidden.shape[0]
        for first in range(0, hidden.shape[0], step):
            end = min(first + step, hidden.shape[0])
            part, tiles = hidden[first:end], state.row_tiles(self.plan.experts, first, end)
            x = self.norm(part, "up", tiles)
            x = self.up(x, tiles)
            x = self.quantized(x, "down")
            self.add(part, x, "down", tiles)
            del x

    def norm(self, hidden: torch.Tensor, op: str, tiles: torch.Tensor) -> Operand:
        """Pre-norm of [rows, C] in the format of ``op``, ``"qkv"`` or ``"up"``: one launch."""
        weight, out = self.attn_norm if op == "qkv" else self.mlp_norm, self.plan.precision[op]
        x, scale = rmsnorm_quantize(hidden, weight, tiles, out=out, backend=self.plan.backend["rmsnorm_quantize"])
        return x, None if out == "bf16" else scale

    def qkv(self, x: Operand, cos_sin: torch.Tensor, tiles: torch.Tensor) -> AttentionInputs:
        """The QKV product of [rows, C], QK-norm, rotation and the gate's sigmoid: one launch."""
        plan, out = self.plan, self.plan.precision["attention"]
        q, k, v, *scales, gate = qkv_linear(
            *x,
            self.weight_of("qkv"),
            self.scale_of("qkv"),
            self.qk_norm,
            cos_sin,
            tiles,
            plan.num_heads_q,
            plan.num_heads_kv,
            out=out,
            qk_scale=self.qk_scale if out == "fp8" else None,
            backend=plan.backend["qkv_linear"],
        )
        q_scale, k_scale, v_scale = (scale if scale.numel() else None for scale in scales)
        return AttentionInputs(q, k, v, q_scale, k_scale, v_scale, gate)

    def attend(
        self, x: AttentionInputs, state: ClipState, *, exact: bool = False, out_scale: torch.Tensor | None = None
    ) -> Operand:
        """Attention times its gate, [rows, Hq * D] as the projection takes it: one launch, and those of a mask.

        Args:
            x: Of all heads, or of some.
            state: What depends on the clip only.
            exact: Whether a sparsity policy does not apply at this denoising step.
            out_scale: Scale of e4m3 output that all heads share; found of ``x`` where None.
        """
        plan, fp8_out = self.plan, self.plan.precision["proj"] == "fp8"
        attended, scale, _ = block_sparse_attention(
            x.q,
            x.k,
            x.v,
            state.block_map(plan, x, exact=exact),
            scale=plan.head_dim**-0.5,
            bound=self.bound.effective,
            q_scale=x.q_scale,
            k_scale=x.k_scale,
            v_scale=x.v_scale,
            gate=x.gate,
            fp8_out=fp8_out,
            out_scale=out_scale,
            backend=plan.backend["block_sparse_attention"],
        )
        return attended.flatten(1), scale if fp8_out else None

    def up(self, x: Operand, tiles: torch.Tensor) -> Operand:
        """The up product of [rows, C] and its activation, [rows, F] as the down product takes it: one launch."""
        fp8 = self.plan.precision["down"] == "fp8"
        y, scale = fp8_linear_activation(
            *x,
            self.weight_of("up"),
            self.scale_of("up"),
            tiles,
            activation=self.activation,
            fp8=fp8,
            backend=self.plan.backend["fp8_linear_activation"],
        )
        return y, scale if fp8 else None

    def quantized(self, x: Operand, op: str) -> Operand:
        """``x`` as ``op``, ``"proj"`` or ``"down"``, reads it: in int8 quantised from bf16, one launch; else itself."""
        if self.plan.precision[op] != "int8":
            return x
        return quantize_rows(x[0], op == "down", backend=self.plan.backend["quantize_rows"])

    def add(self, hidden: torch.Tensor, x: Operand, op: str, tiles: torch.Tensor) -> None:
        """Add ``op``'s product, ``"proj"`` or ``"down"``, to [rows, C] in place: one launch, more with a post-norm."""
        norm = getattr(self, "attn_post_norm" if op == "proj" else "mlp_post_norm", None)
        if norm is None:
            backend = self.plan.backend["fp8_linear_residual"]
            fp8_linear_residual(*x, self.weight_of(op), self.scale_of(op), tiles, hidden, backend=backend)
            return
        branch = self.product(x, op, tiles)
        experts = tiles[:, 0].repeat_interleave(tiles[:, 2] - tiles[:, 1], output_size=hidden.shape[0])
        hidden += rms_norm(branch.float(), norm.index_select(0, experts))

    def product(self, x: Operand, op: str, tiles: torch.Tensor) -> torch.Tensor:
        """``op``'s product [rows, C] in bf16, of a layer with post-norms: one launch."""
        backend = self.plan.backend["fp8_linear"]
        return fp8_linear(*x, self.weight_of(op), self.scale_of(op), tiles, backend=backend)

    def matrices(self) -> list[str]:
        """Names of the products' weights and of their scales."""
        of = [f"{op}_{kind}" for op in OPS if op != "attention" for kind in ("weight", "scale")]
        return [name for name in of if hasattr(self, name)]

    @property
    def activation(self) -> str:
        """Of the MLP: ``"swiglu7"`` or ``"gelu7"``."""
        return "swiglu7" if self.plan.gated else "gelu7"

    def weight_of(self, op: str) -> torch.Tensor:
        """Weight [experts, F, K] of a product."""
        return self._per_expert(f"{op}_weight", 3)

    def scale_of(self, op: str) -> torch.Tensor | None:
        """Scales [experts, F] of a product's weight; None in bf16."""
        return None if self.plan.precision[op] == "bf16" else self._per_expert(f"{op}_scale", 2)

    def _per_expert(self, name: str, dims: int) -> torch.Tensor:
        """A matrix, which is [experts * F, ...] where it is spread over ranks."""
        value: torch.Tensor = getattr(self, name)
        return value if value.dim() == dims else value.unflatten(0, (self.plan.experts, -1))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.require_packed(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.find_bound()

    def require_packed(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise where a state dict has other tensors for this layer than its own packed ones.

        ``load_state_dict(strict=False)`` would drop published weights, and scales, without a word.

        Args:
            state_dict: Tensors by key.
            prefix: What the layer's keys start with, such as ``"block.layers.0."``.

        Raises:
            RuntimeError: As ``load_state_dict`` raises; it names the keys.
        """
        own = dict(self.named_buffers())
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        astray = [f"{prefix}{key}" for key, value in given.items() if key not in own or value.dtype != own[key].dtype]
        if astray:
            raise RuntimeError(
                f"state_dict must hold packed weights as this accelerated layer has them ({', '.join(own)}), got "
                f"{listed(astray)}: call restore(model), load_state_dict, then accelerate(model); or load(folder, "
                "fast=...) for a new model. Nothing was loaded"
            )


def pack_layer(tensors: Mapping[str, torch.Tensor], plan: LayerPlan, device: torch.device) -> FastLayer:
    """Pack one layer's published weights for the kernels; exact in bf16, else quantised once per output channel.

    Args:
        tensors: The layer's tensors under their published keys (``attention.linear_qkv.weight``, ...), on any device.
        plan: What the layer is.
        device: Where the packed weights go.

    Returns:
        The layer; at no time is more than one weight of it held twice on ``device``.
    """
    experts = plan.experts

    def of(name: str) -> torch.Tensor:
        return tensors[name].detach().to(device)

    buffers: dict[str, torch.Tensor] = {}
    norms = {
        "attn_norm": "attention.pre_norm.weight",
        "mlp_norm": "mlp.pre_norm.weight",
        "attn_post_norm": "attn_post_norm.weight",
        "mlp_post_norm": "mlp_post_norm.weight",
    }
    for name, key in norms.items():
        if key in tensors:
            buffers[name] = of(key).float().reshape(experts, -1).contiguous()
    q_norm, k_norm = (of(f"attention.{x}_norm.weight").float() for x in "qk")
    buffers["qk_norm"] = pack_qk_norm(q_norm, k_norm, experts=experts)
    buffers["qk_scale"] = static_qk_scale(buffers["qk_norm"])
    scales: dict[str, torch.Tensor | None] = {}
    buffers["qkv_weight"], scales["qkv_scale"] = pack_qkv_weight(
        of("attention.linear_qkv.weight"),
        experts=experts,
        num_heads_q=plan.num_heads_q,
        num_heads_kv=plan.num_heads_kv,
        head_dim=plan.head_dim,
        to=plan.precision["qkv"],
    )
    linears = {
        "proj": ("attention.linear_proj.weight", 1),
        "up": ("mlp.up_gate_proj.weight", _FEATURE_TILE),
        "down": ("mlp.down_proj.weight", 1),
    }
    for name, (key, pad_f_to) in linears.items():
        pad_k_to = _FEATURE_TILE // (2 if plan.gated else 1) if name == "down" else 1
        buffers[f"{name}_weight"], scales[f"{name}_scale"] = pack_linear(
            of(key),
            experts,
            plan.precision[name],
            pad_f_to=pad_f_to,
            pad_k_to=pad_k_to,
            through_hadamard=name == "down" and plan.precision[name] == "int8",
        )
    layer = FastLayer(plan, buffers | {k: v for k, v in scales.items() if v is not None})
    layer.find_bound()
    return layer


def empty_layer(tensors: Mapping[str, torch.Tensor], plan: LayerPlan) -> FastLayer:
    """The layer that :func:`pack_layer` makes of tensors on ``"meta"``, its packed weights to be filled in.

    Nothing is quantised for it, which takes seconds for a model even there: 8 bits have the shapes of bf16, and a scale
    per output channel.
    """
    shapes = pack_layer(tensors, dataclasses.replace(plan, precision=dict.fromkeys(OPS, "bf16")), torch.device("meta"))
    buffers = dict(shapes.named_buffers())
    for op, precision in plan.precision.items():
        if op != "attention" and precision != "bf16":
            weight = buffers[f"{op}_weight"]
            buffers[f"{op}_weight"] = torch.empty_like(weight, dtype=DTYPES[precision])
            buffers[f"{op}_scale"] = weight.new_empty(weight.shape[:2], dtype=torch.float32)
    return FastLayer(plan, buffers)


def require_kept_dtypes(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raise a TypeError where ``change``, what ``nn.Module.to`` does to each tensor, would give one another dtype."""
    after: dict[tuple[torch.dtype, torch.device], torch.dtype] = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        kind = (tensor.dtype, tensor.device)
        if kind not in after:
            after[kind] = change(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype
        if after[kind] != tensor.dtype:
            raise TypeError(
                f"an accelerated model keeps its dtypes (packed bf16 or 8-bit weights, float32 norms and scales), got "
                f"a conversion of {name} from {tensor.dtype} to {after[kind]} (.to(dtype), .half(), "
                ".float(), .double() or .bfloat16()): restore(model) first, or move it with .to(device) alone"
            )
