"""Run each op of one layer, eager and fast, on its input in eager float32, so that its error is its own.

The ops are the layers' own methods, called one by one. Rounding or quantising the float32 input counts as the op's
error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.eager.model import ROW_CHUNK, HappyHorse, Layer, normed
from happyhorse_fast.eager.sequence import Clip, Ranges, row_chunks
from happyhorse_fast.fast.attention import AttentionInputs, Operand
from happyhorse_fast.fast.clip_state import ClipState
from happyhorse_fast.fast.layer import FastLayer
from happyhorse_fast.ops.attention.reference import output_scale
from happyhorse_fast.ops.linear.contract import static_scale
from happyhorse_fast.ops.qkv.packing import rotary_permutation
from happyhorse_fast.ops.qkv.reference import quantize_k, quantize_v
from happyhorse_fast.ops.quantize import (
    ATTENTION,
    BF16,
    E4M3,
    INT8,
    dequantize,
    int8_rows,
    quantize_static,
    to_e4m3,
    token_order,
)

OPS = ("norm", "qkv", "attention", "proj", "up", "down")
"""``norm`` is the one before QKV; ``qkv`` and ``up`` start from the residual stream, so they hold their norm too."""


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of a layer of the eager model.

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


@contextmanager
def before_layers(model: HappyHorse, look: Callable[[int, Layer, LayerInputs], None]) -> Iterator[None]:
    """Call ``look`` with its number, the layer and its inputs before any layer of a model runs."""

    def hook(index: int, layer: Any, arguments: tuple[Any, ...]) -> None:
        hidden, given = arguments
        look(index, layer, LayerInputs(hidden, given.phases, given.clip, given.ranges))

    layers = model.block.layers
    handles = [layer.register_forward_pre_hook(partial(hook, index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_inputs(model: HappyHorse, inputs: list[torch.Tensor]) -> list[LayerInputs]:
    """Run a forward pass and keep the inputs of every layer."""
    kept: list[LayerInputs] = []
    with torch.no_grad(), before_layers(model, lambda index, layer, given: kept.append(given)):
        model(*inputs)
    return kept


@torch.no_grad()
def eager_ops(layer: Layer, given: LayerInputs, dtype: torch.dtype, exact: OpResults | None = None) -> OpResults:
    """Run the eager layer's ops.

    Args:
        layer: With its weights.
        given: Its inputs in float32.
        dtype: Compute dtype.
        exact: Inputs of the ops after the first, from float32; None where this is the float32 run itself.
    """
    attention, mlp, clip, stream = layer.attention, layer.mlp, given.clip, given.hidden.dtype
    chunks = list(row_chunks(clip, attention.pre_norm.experts, ROW_CHUNK))

    def product(op: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.cat([op(x[rows].to(dtype), e) for e, rows in chunks]).to(stream)

    norm = normed(given.hidden, attention.pre_norm, clip).to(dtype)
    q, k, v, gate = attention.qkv(given.hidden, given.phases, clip, dtype)
    gate = torch.sigmoid(gate)
    inputs = (q, k, v) if exact is None else (exact.q.to(dtype), exact.k.to(dtype), exact.v.to(dtype))
    attended = attention.attend(*inputs, given.ranges)
    gated = attention.gated(attended, gate if exact is None else exact.gate)
    proj = product(attention.project, gated if exact is None else exact.attention)
    middle = layer.add(given.hidden, proj, "attn_post_norm", clip) if exact is None else exact.middle
    up = torch.cat([mlp.up(middle[rows], e, dtype) for e, rows in chunks])
    down = product(mlp.down, up if exact is None else exact.up)
    return OpResults(norm, q, k, v, gate, gated, proj, middle, up, down)


@dataclass(frozen=True)
class FastOps:
    """The ops of a fast layer, each on its float32 input.

    Attributes:
        layer: Packed.
        state: Of the clip.
        given: The eager layer's inputs in float32.
        exact: The eager layer's results in float32.
    """

    layer: FastLayer
    state: ClipState
    given: LayerInputs
    exact: OpResults

    @torch.no_grad()
    def results(self) -> OpResults:
        """Run all of them in the layer's formats and on its implementations."""
        norm, q, k, v, gate = self._norm_and_qkv()
        attention, proj, up, down = self._attention(), self._product("proj"), self._up(), self._product("down")
        return OpResults(norm, q, k, v, gate, attention, proj, self.given.hidden[:0], up, down)

    @torch.no_grad()
    def attention_in(self, precision: str) -> torch.Tensor:
        """Run attention alone in a format that need not be the layer's, [N, Hq * D] after the gate, in plain torch.

        Its own error: with the rounding points of the kernels, over the exact mask, its result rounded to bf16.

        Args:
            precision: One of `quantize.ATTENTION`.
        """
        return self._changed({"block_sparse_attention": "reference"}, attention=precision, proj="bf16")._attention()

    @torch.no_grad()
    def products(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (op, result [N, features]) of the products of a layer with attention in bf16, each result in bf16.

        Quantising a result is the error of the next op, whose format asks for it.
        """
        yield "qkv", side_by_side(*self._norm_and_qkv()[1:])
        for op in ("proj", "down"):
            yield op, self._product(op)
        yield "up", self._changed({}, down="bf16")._up()

    def _changed(self, backend: Mapping[str, str], **precision: str) -> FastOps:
        """The same of a layer with some ops in another format, on the same buffers."""
        old = self.layer.plan
        plan = dataclasses.replace(old, precision={**old.precision, **precision}, backend={**old.backend, **backend})
        layer = FastLayer(plan, dict(self.layer.named_buffers()))
        layer.bound = self.layer.bound
        return dataclasses.replace(self, layer=layer)

    @property
    def _tiles(self) -> torch.Tensor:
        return self.state.row_tiles(self.layer.plan.experts)

    def _rows(self, tokens: torch.Tensor, columns: int | None = None) -> torch.Tensor:
        """[N, ...] in the public order -> [rows, ...] float32 padded with zeros, to ``columns`` where given."""
        shape = (self.state.rows.slots, columns or tokens.shape[1], *tokens.shape[2:])
        out = torch.zeros(shape, device=tokens.device)
        out[self.state.token_rows, : tokens.shape[1]] = tokens.float()
        return out

    def _values(self, result: Operand) -> torch.Tensor:
        """[rows, features] of an op -> [N, features] float32 in the public order."""
        codes, scale = result
        return (codes.float() if scale is None else dequantize(codes, scale))[self.state.token_rows]

    def _norm_and_qkv(self) -> tuple[torch.Tensor, ...]:
        """norm [N, C]; q [N, Hq, D], k and v [N, Hkv, D], gate [N, Hq] of its codes."""
        tiles = self._tiles
        x = self.layer.norm(self._rows(self.given.hidden), "qkv", tiles)
        codes: Any = self.layer.qkv(x, self.state.cos_sin, tiles)
        q, k, v = codes.q.float(), codes.k.float(), codes.v
        if codes.q.dtype == INT8:
            q, k = q * codes.q_scale[..., None], k * _each_row(codes.k_scale)[:, : len(k)].T[..., None]
        elif codes.q.dtype == E4M3:
            scales = (codes.q_scale, codes.k_scale)
            q, k = (x * _each_row(scale)[: len(x), None, None] for x, scale in zip((q, k), scales, strict=True))
        if v.dtype == E4M3:
            v = (token_order(v).float() * _each_row(codes.v_scale)[:, None]).permute(2, 0, 1)
        published = torch.argsort(rotary_permutation(self.layer.plan.head_dim)).to(q.device)
        q, k = (x[self.state.token_rows][..., published] for x in (q, k))
        return self._values(x), q, k, v.float()[self.state.token_rows], codes.gate[self.state.token_rows]

    def _attention(self) -> torch.Tensor:
        of_qk, of_v = ATTENTION[self.layer.plan.precision["attention"]]
        q, k, v, gate = (self._rows(x) for x in (self.exact.q, self.exact.k, self.exact.v, self.exact.gate))
        q_scale = k_scale = v_scale = None
        if of_qk == BF16:
            q, k = q.bfloat16(), k.bfloat16()
        elif of_qk == INT8:
            q, q_scale = int8_rows(q)
            k, k_scale = quantize_k(k)
            k_scale = k_scale.contiguous()
        else:
            of_blocks = self.layer.qk_scale.index_select(0, self._tiles[:, 0])  # as the epilogue of QKV gives them
            q_scale, k_scale = of_blocks.T.contiguous()
            q, k = (to_e4m3(x / _each_row(scale)[: len(x), None, None]) for x, scale in ((q, q_scale), (k, k_scale)))
        if of_v == E4M3:
            v, v_scale = quantize_v(v)
        else:
            v = v.bfloat16()
        return self._values(self.layer.attend(AttentionInputs(q, k, v, q_scale, k_scale, v_scale, gate), self.state))

    def _up(self) -> torch.Tensor:
        tiles = self._tiles
        y = self.layer.up(self.layer.norm(self._rows(self.exact.middle), "up", tiles), tiles)
        return self._values(y)[:, : self.exact.up.shape[1]]

    def _product(self, op: str) -> torch.Tensor:
        """proj or down of a float32 input, in the format that the op before would have written it."""
        rows = self._rows(self.exact.attention if op == "proj" else self.exact.up, self.layer.weight_of(op).shape[2])
        if self.layer.plan.precision[op] == "fp8":
            if op == "proj":
                scale = output_scale(self.exact.v.float(), None, self.exact.gate.float())
            else:
                scale = static_scale(self.layer.activation, True, rows.device)
            x: Operand = quantize_static(rows, scale), scale
        else:
            x = self.layer.quantized((rows.bfloat16(), None), op)
        tiles = self._tiles
        # With a post-norm the product is a launch of its own, whose result the norm takes.
        if hasattr(self.layer, "attn_post_norm"):
            return self.layer.product(x, op, tiles)[self.state.token_rows]
        branch = torch.zeros(len(rows), self.exact.middle.shape[1], device=rows.device)
        self.layer.add(branch, x, op, tiles)
        return branch[self.state.token_rows]


def side_by_side(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """[N, heads, D] three times and [N, heads] -> [N, features] float32."""
    return torch.cat([part.float() for part in (q.flatten(1), k.flatten(1), v.flatten(1), gate)], dim=1)


def _each_row(scale: torch.Tensor) -> torch.Tensor:
    """[..., S] of blocks -> [..., S * 128] of their rows."""
    return scale.repeat_interleave(BLOCK, dim=-1)
