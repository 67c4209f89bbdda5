"""The ops of one layer, eager and fast, each run on what eager float32 gives it: an op's own error, not what came in.

Every op starts from its float32 input, so rounding or quantising that input counts as the op's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.model.clip_state import ClipState
from happyhorse_fast.model.fast_layer import FastLayer
from happyhorse_fast.ops.block_sparse_attention import block_sparse_attention
from happyhorse_fast.ops.fp8_linear import fp8_linear, fp8_linear_activation, fp8_linear_residual, static_scale
from happyhorse_fast.ops.packing_qkv import rotary_permutation
from happyhorse_fast.ops.quantize_rows import quantize_rows
from happyhorse_fast.ops.rmsnorm_qkv import qkv_linear, rmsnorm_quantize
from happyhorse_fast.reference import block_sparse_attention as reference_attention
from happyhorse_fast.reference.mlp import gelu7, swiglu7
from happyhorse_fast.reference.model import ROW_CHUNK, HappyHorse, Layer
from happyhorse_fast.reference.quantize import dequantize, quantize_static, to_e4m3, token_order
from happyhorse_fast.reference.quantized_qkv import quantize_k, quantize_q, quantize_v
from happyhorse_fast.reference.rmsnorm_qkv import rms_norm, rmsnorm_qkv
from happyhorse_fast.reference.sequence import Clip, Ranges, row_chunks
from happyhorse_fast.reference.sparse_attention import output_scale

OPS = ("norm", "qkv", "attention", "proj", "up", "down")
"""``norm`` is the one before QKV; ``qkv`` and ``up`` start from the residual stream, so they hold their norm too."""


@dataclass(frozen=True)
class LayerInputs:
    """What a layer of the eager model was called with.

    Attributes:
        hidden: [N, C] residual stream.
        phases: [N, 6B].
        clip: Token grid.
        ranges: Attention ranges.
    """

    hidden: torch.Tensor
    phases: torch.Tensor
    clip: Clip
    ranges: Ranges


@dataclass(frozen=True)
class OpResults:
    """Results of a layer's ops, token rows in the public order.

    Attributes:
        norm: [N, C].
        q: [N, Hq, D].
        k: [N, Hkv, D].
        v: [N, Hkv, D].
        gate: [N, Hq] after its sigmoid.
        attention: [N, Hq * D] after the gate.
        proj: [N, C], before a post-norm.
        middle: [N, C] residual stream between attention and MLP; empty where it was not asked for.
        up: [N, F] after the activation.
        down: [N, C], before a post-norm.
    """

    norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor
    attention: torch.Tensor
    proj: torch.Tensor
    middle: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def of(self, op: str) -> torch.Tensor:
        """One op's result as [N, features] float32; ``qkv`` is q, k, v and gate side by side."""
        if op == "qkv":
            return side_by_side(self.q, self.k, self.v, self.gate)
        value: torch.Tensor = getattr(self, op)
        return value.float()


def record_inputs(model: HappyHorse, inputs: list[torch.Tensor]) -> list[LayerInputs]:
    """Run a forward pass and keep what every layer was called with."""
    kept: list[LayerInputs] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given: kept.append(LayerInputs(*given[:4])))
        for layer in model.block.layers
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def eager_ops(layer: Layer, given: LayerInputs, dtype: torch.dtype, exact: OpResults | None = None) -> OpResults:
    """The eager layer's ops.

    Args:
        layer: With its weights.
        given: Its inputs in float32.
        dtype: Compute dtype.
        exact: Inputs of the ops after the first, from float32; None where this is the float32 run itself.
    """
    attention, mlp, stream = layer.attention, layer.mlp, given.hidden.dtype
    chunks = list(row_chunks(given.clip, attention.pre_norm.experts, ROW_CHUNK))

    def product(x: torch.Tensor, weight: Any) -> torch.Tensor:
        return torch.cat([linear(x[rows].to(dtype), weight.of(e).to(dtype)) for e, rows in chunks]).to(stream)

    def norm(x: torch.Tensor, weight: Any) -> torch.Tensor:
        return torch.cat([rms_norm(x[rows], weight.of(e)) for e, rows in chunks])

    parts = [
        rmsnorm_qkv(
            given.hidden[rows],
            attention.pre_norm.of(e),
            attention.linear_qkv.of(e),
            attention.q_norm.of(e),
            attention.k_norm.of(e),
            given.phases[rows],
            compute_dtype=dtype,
            **attention.heads,
        )
        for e, rows in chunks
    ]
    q, k, v, gate = (torch.cat(p) for p in zip(*parts, strict=True))
    gate = torch.sigmoid(gate)
    queries, keys, values = (own if exact is None else of.to(dtype) for own, of in _pairs(exact, q=q, k=k, v=v))
    if queries.is_cuda and dtype == torch.bfloat16:
        attended = reference_attention.fused_attention(queries, keys, values, given.ranges)
    else:
        attended, _ = reference_attention.block_sparse_attention(queries, keys, values, given.ranges)
    gated = (attended.to(stream) * (gate if exact is None else exact.gate)[..., None]).flatten(1).to(dtype)
    proj = product(gated if exact is None else exact.attention, attention.linear_proj)
    middle = given.hidden + (norm(proj, layer.attn_post_norm) if layer.post_norm else proj)
    middle = middle if exact is None else exact.middle
    activation = swiglu7 if mlp.gated else gelu7
    up = activation(product(norm(middle, mlp.pre_norm), mlp.up_gate_proj)).to(dtype)
    down = product(up if exact is None else exact.up, mlp.down_proj)
    return OpResults(norm(given.hidden, attention.pre_norm).to(dtype), q, k, v, gate, gated, proj, middle, up, down)


def _pairs(exact: OpResults | None, **own: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(value, value if exact is None else getattr(exact, name)) for name, value in own.items()]


@torch.no_grad()
def fast_ops(layer: FastLayer, state: ClipState, given: LayerInputs, exact: OpResults) -> OpResults:
    """The fast layer's ops in the layer's formats and on its implementations, each on its float32 input.

    Args:
        layer: Packed.
        state: Of the clip.
        given: The eager layer's inputs in float32.
        exact: The eager layer's results in float32.
    """
    return _FastOps(layer, state).run(given, exact)


@torch.no_grad()
def attention_in(precision: str, layer: FastLayer, state: ClipState, exact: OpResults) -> torch.Tensor:
    """Attention alone in a format that need not be the layer's, [N, Hq * D] after the gate, in plain torch.

    Its own error: with the rounding points of the kernels, over the exact mask, its result rounded to bf16.

    Args:
        precision: ``"bf16"``, ``"int8_qk"`` or ``"fp8"``.
        layer: Packed.
        state: Of the clip.
        exact: The eager layer's results in float32.
    """
    ops = _FastOps(layer, state)
    ops.precision = {**ops.precision, "attention": precision, "proj": "bf16"}
    ops.backend = {**ops.backend, "block_sparse_attention": "reference"}
    return ops._attention(exact)


@torch.no_grad()
def products_alone(
    layer: FastLayer, state: ClipState, given: LayerInputs, exact: OpResults
) -> Iterator[tuple[str, torch.Tensor]]:
    """(op, result [N, features]) of the layer's products, each on its float32 input and with a result in bf16.

    What a result loses as the next op's codes is that op's error, since its format is what asks for them.

    Args:
        layer: Packed, attention in bf16.
        state: Of the clip.
        given: The eager layer's inputs in float32.
        exact: The eager layer's results in float32.
    """
    ops = _FastOps(layer, state)
    yield "qkv", side_by_side(*ops._qkv(*ops._norm(given.hidden, layer.attn_norm, "qkv")))
    yield "proj", ops._proj(given, exact)
    yield "down", ops._down(given, exact)
    ops.precision = {**ops.precision, "down": "bf16"}
    yield "up", ops._up(exact.middle)[:, : exact.up.shape[1]]


def side_by_side(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """[N, heads, D] three times and [N, heads] -> [N, features] float32."""
    return torch.cat([part.float() for part in (q.flatten(1), k.flatten(1), v.flatten(1), gate)], dim=1)


class _FastOps:
    def __init__(self, layer: FastLayer, state: ClipState) -> None:
        self.layer, self.state, self.plan = layer, state, layer.plan
        self.tiles = state.row_tiles(layer.plan.experts)
        self.precision, self.backend = layer.plan.precision, layer.plan.backend
        self.activation = "swiglu7" if self.plan.gated else "gelu7"

    def run(self, given: LayerInputs, exact: OpResults) -> OpResults:
        x, x_scale = self._norm(given.hidden, self.layer.attn_norm, "qkv")
        q, k, v, gate = self._qkv(x, x_scale)
        up = self._up(exact.middle)
        return OpResults(
            norm=self._tokens(_values(x, x_scale)),
            q=q,
            k=k,
            v=v,
            gate=gate,
            attention=self._attention(exact),
            proj=self._proj(given, exact),
            middle=given.hidden[:0],
            up=up[:, : exact.up.shape[1]],
            down=self._down(given, exact),
        )

    def _proj(self, given: LayerInputs, exact: OpResults) -> torch.Tensor:
        scale = output_scale(exact.v.float(), None, exact.gate.float())
        return self._product("proj", exact.attention, scale, given.hidden.shape[1])

    def _down(self, given: LayerInputs, exact: OpResults) -> torch.Tensor:
        scale = static_scale(self.activation, True, exact.up.device)
        return self._product("down", exact.up, scale, given.hidden.shape[1])

    def _rows(self, tokens: torch.Tensor, columns: int | None = None) -> torch.Tensor:
        """[N, ...] in the public order -> [rows, ...] float32 padded with zeros, to ``columns`` where given."""
        wide = tokens.float()
        if columns is not None:
            wide = torch.nn.functional.pad(wide, (0, columns - wide.shape[1]))
        out = torch.zeros(self.state.rows.slots, *wide.shape[1:], device=wide.device)
        out[self.state.token_rows] = wide
        return out

    def _tokens(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self.state.token_rows]

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor, feeds: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = self.precision[feeds]
        x, scale = rmsnorm_quantize(
            self._rows(hidden), weight, self.tiles, out=out, backend=self.backend["rmsnorm_quantize"]
        )
        return x, None if out == "bf16" else scale

    def _weight(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale = None if self.precision[name] == "bf16" else getattr(self.layer, f"{name}_scale")
        return getattr(self.layer, f"{name}_weight"), scale

    def _qkv(self, x: torch.Tensor, x_scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        plan, out = self.plan, self.precision["attention"]
        q, k, v, q_scale, k_scale, v_scale, gate = qkv_linear(
            x,
            x_scale,
            *self._weight("qkv"),
            self.layer.qk_norm,
            self.state.cos_sin,
            self.tiles,
            plan.num_heads_q,
            plan.num_heads_kv,
            out=out,
            qk_scale=self.layer.qk_scale if out == "fp8" else None,
            backend=self.backend["qkv_linear"],
        )
        published = torch.argsort(rotary_permutation(plan.head_dim)).to(q.device)
        q, k = q.float(), k.float()
        if out == "int8_qk":
            q, k = q * q_scale[..., None], k * _each_row(k_scale)[:, : len(k)].T[..., None]
        elif out == "fp8":
            q, k = (x * _each_row(scale)[: len(x), None, None] for x, scale in ((q, q_scale), (k, k_scale)))
        q, k = (self._tokens(x)[..., published] for x in (q, k))
        if out == "fp8":
            v = (token_order(v).float() * _each_row(v_scale)[:, None]).permute(2, 0, 1)
        return q, k, self._tokens(v.float()), self._tokens(gate)

    def _attention(self, exact: OpResults) -> torch.Tensor:
        plan, out = self.plan, self.precision["attention"]
        q, k, v = (self._rows(x) for x in (exact.q, exact.k, exact.v))
        q_scale = k_scale = v_scale = None
        if out == "bf16":
            q, k = q.bfloat16(), k.bfloat16()
        elif out == "int8_qk":
            q, q_scale = quantize_q(q)
            k, k_scale = quantize_k(k)
            k_scale = k_scale.contiguous()
        else:
            of_blocks = self.layer.qk_scale.index_select(0, self.tiles[:, 0])  # as the epilogue of QKV gives them
            q_scale, k_scale = of_blocks.T.contiguous()
            q, k = (to_e4m3(x / _each_row(scale)[: len(x), None, None]) for x, scale in ((q, q_scale), (k, k_scale)))
            v, v_scale = quantize_v(v)
        fp8_out = self.precision["proj"] == "fp8"
        attended, out_scale, _ = block_sparse_attention(
            q,
            k,
            v if out == "fp8" else v.bfloat16(),
            self.state.block_map(plan, q, k, q_scale, k_scale),
            scale=plan.head_dim**-0.5,
            bound=self.layer.bound.effective,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            gate=self._rows(exact.gate),
            fp8_out=fp8_out,
            backend=self.backend["block_sparse_attention"],
        )
        return self._tokens(_values(attended, out_scale if fp8_out else None)).flatten(1)

    def _up(self, middle: torch.Tensor) -> torch.Tensor:
        x, x_scale = self._norm(middle, self.layer.mlp_norm, "up")
        fp8 = self.precision["down"] == "fp8"
        y, y_scale = fp8_linear_activation(
            x,
            x_scale,
            *self._weight("up"),
            self.tiles,
            activation=self.activation,
            fp8=fp8,
            backend=self.backend["fp8_linear_activation"],
        )
        return self._tokens(_values(y, y_scale if fp8 else None))

    def _product(self, name: str, tokens: torch.Tensor, of_codes: torch.Tensor, width: int) -> torch.Tensor:
        """proj or down of a float32 input, in the format that the op before would have written it."""
        weight, scale = self._weight(name)
        x, x_scale = self._rows(tokens, weight.shape[2]), None
        if scale is None:
            x = x.bfloat16()
        elif self.precision[name] == "int8":
            x, x_scale = quantize_rows(x.bfloat16(), name == "down", backend=self.backend["quantize_rows"])
        else:
            x, x_scale = quantize_static(x, of_codes), of_codes
        if hasattr(self.layer, "attn_post_norm"):
            return self._tokens(fp8_linear(x, x_scale, weight, scale, self.tiles, backend=self.backend["fp8_linear"]))
        branch = torch.zeros(x.shape[0], width, device=x.device)
        fp8_linear_residual(x, x_scale, weight, scale, self.tiles, branch, backend=self.backend["fp8_linear_residual"])
        return self._tokens(branch)


def _each_row(scale: torch.Tensor) -> torch.Tensor:
    """[..., S] of blocks -> [..., S * 128] of their rows."""
    return scale.repeat_interleave(BLOCK, dim=-1)


def _values(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return codes.float() if scale is None else dequantize(codes, scale)
