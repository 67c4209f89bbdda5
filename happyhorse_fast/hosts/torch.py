"""`torch.nn.functional.scaled_dot_product_attention` by this package, inside a `with`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.hosts.calls import Calls
from happyhorse_fast.hosts.key_masks import broadcast
from happyhorse_fast.hosts.sparse import Chosen

_OPEN = threading.Lock()


@contextlib.contextmanager
def sdpa(
    *,
    backend: str = "auto",
    strict: bool = False,
    sparsity: BlockMap | Chosen | None = None,
    float16: bool = False,
) -> Iterator[Calls]:
    """`torch.nn.functional.scaled_dot_product_attention` takes this package's kernels where a call fits, in this block.

    For code that calls it as an attribute of the module, such as ``F.scaled_dot_product_attention(q, k, v)``; what has
    taken the function itself before keeps PyTorch's. Calls of other threads go to PyTorch.

    Args:
        backend: As for :class:`Calls`.
        strict: Raise where a call does not fit, rather than run PyTorch's.
        sparsity: As for :class:`Calls`; None: exact.
        float16: As for :class:`Calls`.

    Yields:
        The calls, counted: ``print(calls)`` says what ran where, and why.

    Raises:
        RuntimeError: A block is open already: the name is one for the whole process.
    """
    calls = Calls("PyTorch", backend=backend, strict=strict, sparsity=sparsity, float16=float16)
    if not _OPEN.acquire(blocking=False):
        raise RuntimeError("hosts.sdpa() is open already, in this thread or another: one block at a time")
    own, thread = functional.scaled_dot_product_attention, threading.get_ident()

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def run() -> Tensor:
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        if not torch.compiler.is_compiling() and threading.get_ident() != thread:
            return run()
        return calls(
            query,
            key,
            value,
            run,
            mask=broadcast(attn_mask, query.shape[0], key.shape[-2], by_item=False),
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    try:
        functional.scaled_dot_product_attention = scaled_dot_product_attention
        yield calls
    finally:
        functional.scaled_dot_product_attention = own
        _OPEN.release()
