"""Attention of any model's tensors, as PyTorch's `scaled_dot_product_attention` is called: exact, and no setup."""

from __future__ import annotations

import functools
from typing import Literal, overload

import torch
from torch import Tensor

from happyhorse_fast.arguments import real_number
from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.ops.attention.op import block_sparse_attention
from happyhorse_fast.ops.runtime.checks import HEAD_DIMS, is_capturing, is_differentiated, require_backend

MAPS = 8
"""Dense maps that are remembered; of 64,256 tokens one has 2 MB, of 187,392 17 MB."""


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = True,
    block_map: BlockMap | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = True,
    block_map: BlockMap | None = None,
    return_lse: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = True,
    block_map: BlockMap | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q.k) v over every key, or over the blocks of a map, in bf16 with float32 sums.

    Query head h reads key head h // (Hq / Hkv). Whether the norms bound every score, so that the softmax needs no
    running maximum (`score_bound`), is found on the device: the result is as exact either way, and the host
    waits for nothing. A call can be captured in a CUDA graph after one of the same shape. NaN and inf spread as they do
    in PyTorch, but keys of blocks that a map leaves out are not read.

    Args:
        q: [B, Hq, N, D] or [N, Hq, D] bf16, any strides; D 32, 64 or 128.
        k: [B, Hkv, M, D] or [M, Hkv, D] bf16; Hkv divides Hq.
        v: As ``k``.
        attn_mask: None; what hides keys is ``block_map``.
        dropout_p: 0.
        is_causal: False.
        scale: Softmax scale, positive; D^-0.5 where None.
        enable_gqa: Whether Hkv may be less than Hq.
        block_map: N queries and M keys, for one head or Hkv heads, the same for the whole batch; dense where None.
        return_lse: Whether the log-sum-exp is wanted too.
        backend: ``"triton"``, ``"cuda"`` or ``"reference"``; ``"auto"`` is Triton for tensors on a GPU, else the
            reference.

    Returns:
        out bf16, of q's shape. With ``return_lse`` also the natural log of the sum of exp(scale * q.k), float32
        [B, Hq, N] or [Hq, N]. A query without a key gives 0 and -inf.

    Raises:
        TypeError: No tensor, one that is not bf16, no BlockMap, or a scale that is no number.
        ValueError: A mask, dropout or causality, tensors that require gradients or carry tangents, or another shape,
            device or value than listed; the message names it, what came and what is allowed.
    """
    require_backend(backend, ("auto", "triton", "cuda", "reference"))
    if attn_mask is not None:
        raise ValueError("attn_mask must be None: a BlockMap as block_map says which keys a query sees")
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}")
    if is_causal:
        raise ValueError("is_causal must be False: pass block_map, such as BlockMap.from_ranges makes")
    _check(q, k, v, enable_gqa)
    if backend == "auto":
        backend = "triton" if q.is_cuda else "reference"
    batched = q.dim() == 4
    if block_map is None:
        block_map = _dense(q.shape[-2] if batched else q.shape[0], k.shape[-2] if batched else k.shape[0], q)
    # The constant, not the size: torch.compile(dynamic=True) has no number for a size, and cannot hold its root.
    number = HEAD_DIMS[HEAD_DIMS.index(q.shape[-1])] ** -0.5 if scale is None else real_number(scale)
    if number is None:
        raise TypeError(f"scale must be a positive number or None, got {scale!r}")
    call = functools.partial(
        block_sparse_attention, block_map=block_map, scale=number, return_lse=return_lse, backend=backend
    )
    if not batched:
        out, _, lse = call(q, k, v)
        return (out, lse) if return_lse else out
    # One launch an item: batch and heads fold into one dimension in few layouts, and an item whose scores are bounded
    # need not do as one whose are not.
    parts = [call(*(x.transpose(0, 1) for x in item)) for item in zip(q, k, v, strict=True)]
    outs, lses = ([part[i] for part in parts] for i in (0, 2))
    out = (outs[0].unsqueeze(0) if len(outs) == 1 else torch.stack(outs)).transpose(1, 2)
    return (out, torch.stack(lses)) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """Hold what :func:`block_sparse_attention` does not check, or names by tensors that the caller does not know."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a bfloat16 tensor, got {type(x).__name__}")
        if x.dtype != torch.bfloat16:
            raise TypeError(f"{name} must be bfloat16, got {str(x.dtype)[6:]}: pass {name}.bfloat16()")
        if x.dim() not in (3, 4) or x.dim() != q.dim():
            raise ValueError(
                f"{name} must be [B, heads, tokens, D] or [tokens, heads, D], as q is; got {list(x.shape)} "
                f"with q {list(q.shape)}"
            )
        if is_differentiated(x):
            raise ValueError(
                f"{name} requires gradients, which this attention has none of: call it under torch.no_grad(), on "
                "tensors without tangents"
            )
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"q must have a head dim of {', '.join(map(str, HEAD_DIMS))}; got {list(q.shape)}")
    batch = q.shape[:-3]
    if k.shape[:-3] != batch or v.shape != k.shape or k.shape[-1] != q.shape[-1] or 0 in batch:
        raise ValueError(
            f"k and v must be alike, with q's batch and head dim, and the batch not empty; got q {list(q.shape)}, "
            f"k {list(k.shape)}, v {list(v.shape)}"
        )
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(f"k must have q's {q.shape[1]} heads where enable_gqa is False, got {k.shape[1]}")


def _dense(queries: int, keys: int, like: Tensor) -> BlockMap:
    device = like.device
    # What a trace makes must not outlive it, and what a graph reads must not be forgotten before the graph is.
    if type(like) is not torch.Tensor or torch.compiler.is_compiling() or is_capturing(device):
        return BlockMap.dense(queries, keys, device)
    # Another stream would read a map that this one has yet to write.
    return _remembered(queries, keys, device, torch.cuda.current_stream(device) if device.type == "cuda" else None)


@functools.lru_cache(maxsize=MAPS)
def _remembered(queries: int, keys: int, device: torch.device, stream: object) -> BlockMap:
    return BlockMap.dense(queries, keys, device)
