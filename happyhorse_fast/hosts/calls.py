"""A host's attention calls: those that fit are `happyhorse_fast.attention`'s, the others stay the host's own."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.hosts.key_masks import KeyMasks
from happyhorse_fast.hosts.sparse import Chosen, Sparse
from happyhorse_fast.ops.attention.sdpa import attention
from happyhorse_fast.ops.runtime.checks import HEAD_DIMS, is_capturing, is_differentiated, require_backend
from happyhorse_fast.ops.runtime.dispatch import op_choice

logger = logging.getLogger(__name__)


class Calls:
    """Takes a host's attention calls, counts them, and gives back those that do not fit.

    A call fits that is bf16, without dropout, causality and gradients, of head dim 32, 64 or 128, masked at most by
    keys (:class:`KeyMasks`), on a GPU whose kernel passed its self-check. What does not fit runs as it would have
    without this package, and the logger ``happyhorse_fast`` says so once for each reason.

    Args:
        host: Its name, for messages.
        backend: As for :func:`happyhorse_fast.attention`; ``"auto"`` is the kernel that passed its self-check on the
            tensors' GPU, found at the first call there, in seconds, and nothing on a CPU.
        strict: Raise where a call does not fit.
        sparsity: Which pairs to leave out, of the calls that it is for: a :class:`BlockMap` for one head, of their
            queries and keys, or :class:`Chosen`; None: none, attention is exact.
        float16: Take calls in float16 too, as bf16: approximate, of 11 significant bits 8 are left.

    Attributes:
        taken: Calls that ran here; those of a compiled graph do not count.
        left: Reason -> calls that the host ran itself; likewise.
    """

    def __init__(
        self,
        host: str,
        *,
        backend: str = "auto",
        strict: bool = False,
        sparsity: BlockMap | Chosen | None = None,
        float16: bool = False,
    ) -> None:
        require_backend(backend, ("auto", "triton", "cuda", "reference"))
        self.host, self.backend, self.strict, self.float16 = host, backend, strict, float16
        self._sparse = None if sparsity is None else Sparse(sparsity)
        self.taken = 0
        self.left: Counter[str] = Counter()
        self._masks = KeyMasks()
        self._chosen: dict[str, tuple[str, str | None]] = {}

    def __str__(self) -> str:
        lines = [f"{self.host}: {self.taken} attention calls by happyhorse_fast"]
        lines += [f"{count} by {self.host} itself: {reason}" for reason, count in self.left.items()]
        return "; ".join(lines)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Callable[[], Tensor],
        *,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = True,
        obstacle: str | None = None,
    ) -> Tensor:
        """Attention of a call, here or by the host.

        Args:
            q: [B, Hq, N, D].
            k: [B, Hkv, M, D].
            v: As ``k``.
            own: What the host would have done.
            mask: bool or additive, [B, Hq, N, M] but for dimensions of 1 (:func:`key_masks.broadcast`).
            dropout_p: As for PyTorch's `scaled_dot_product_attention`.
            is_causal: As there.
            scale: As there.
            enable_gqa: As there.
            obstacle: Why the host knows that the call does not fit.

        Returns:
            [B, Hq, N, D], where it ran here in q's dtype and laid out as [B, N, Hq, D].

        Raises:
            ValueError: The call does not fit and ``strict`` is set.
        """
        dtype = q.dtype
        if self.float16 and dtype == torch.float16:
            q, k, v = (x.bfloat16() if x.dtype == dtype else x for x in (q, k, v))
        reason = obstacle or _tensors_obstacle(q, k, v, enable_gqa) or _options_obstacle(dropout_p, is_causal, scale)
        if reason is None and mask is not None:
            reason = self._masks.obstacle(mask, q, k)
        backend = self.backend
        if reason is None and backend == "auto":
            backend, reason = self._choose(q.device)
        if reason is None and backend == "cuda" and not all(map(_in_vectors, (q, k, v))):
            reason = "channels apart, or rows off 16 bytes, which the CUDA kernel does not read"
        if reason is not None:
            self.leave(reason)
            return own()
        if not torch.compiler.is_compiling():
            self.taken += 1
            if self.taken == 1:
                logger.info("%s: attention by happyhorse_fast, backend %s", self.host, backend)
        maps: Sequence[BlockMap | None] = [None]
        if mask is not None:
            maps = self._masks.maps(mask, q.shape[2])
        elif self._sparse is not None:
            maps = self._sparse.maps(q, k, backend)
        return self._run(q, k, v, maps, scale, backend).to(dtype)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, maps: Sequence[BlockMap | None], scale: float | None, backend: str
    ) -> Tensor:
        """A launch for each item of the batch where each has a map of its own."""
        run: Any = functools.partial(attention, scale=scale, backend=backend)
        if len(maps) == 1:
            return run(q, k, v, block_map=maps[0])
        items = zip(q, k, v, maps, strict=True)
        parts = [run(*(x.transpose(0, 1) for x in item), block_map=block_map) for *item, block_map in items]
        return torch.stack(parts).transpose(1, 2)

    def _choose(self, device: torch.device) -> tuple[str, str | None]:
        """The backend for tensors on a device, and why there is none."""
        known = self._chosen.get(str(device))
        if known is None:
            if torch.compiler.is_compiling() or is_capturing(device):
                return "auto", f"no kernel has passed its self-check on {device} yet: run once before what is recorded"
            needed = ["block_sparse_attention", *(["select_blocks"] if self._sparse is not None else [])]
            choices = [op_choice(op, device) for op in needed]
            reference = [choice.reason for choice in choices if choice.backend == "reference"]
            known = ("auto", reference[0]) if reference else (choices[0].backend, None)
            self._chosen[str(device)] = known
        return known

    def leave(self, reason: str) -> None:
        """Count a call that the host runs itself.

        Raises:
            ValueError: ``strict`` is set.
        """
        if self.strict:
            raise ValueError(f"strict: {self.host} would run attention itself: {reason}")
        if torch.compiler.is_compiling():
            return
        self.left[reason] += 1
        if self.left[reason] == 1:
            logger.warning("%s runs attention itself: %s", self.host, reason)


def _tensors_obstacle(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> str | None:
    """Why a call of these tensors does not fit."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.dtype != torch.bfloat16:
            return f"{name} is {str(x.dtype)[6:]}, not bfloat16"
        if x.dim() != 4:
            return f"{name} has {x.dim()} dimensions, not 4"
        if x.device != q.device:
            return f"{name} is on another device than query"
        if is_differentiated(x):
            return f"{name} requires gradients"
    if q.shape[3] not in HEAD_DIMS:
        return f"head dim {int(q.shape[3])}, not {', '.join(map(str, HEAD_DIMS))}"
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or 0 in (*q.shape, *k.shape):
        return "query, key and value do not have one batch and head dim, or are empty"
    heads, own = int(q.shape[1]), int(k.shape[1])
    if heads % own or (heads != own and not enable_gqa):
        return f"{heads} heads of queries on {own} of keys" + ("" if heads % own else " without enable_gqa")
    return None


def _options_obstacle(dropout_p: float, is_causal: bool, scale: float | None) -> str | None:
    """Why a call with these options does not fit."""
    if dropout_p != 0:
        return "dropout"
    if is_causal:
        return "is_causal"
    return None if scale is None or 0 < scale < math.inf else "scale is not positive and finite"


def _in_vectors(x: Tensor) -> bool:
    """Whether a tensor's rows of channels can be read 16 bytes at a time."""
    size = x.element_size()
    return x.stride(3) == 1 and all(stride * size % 16 == 0 for stride in (x.storage_offset(), *x.stride()[:3]))
