"""Attention of a ComfyUI model by this package: the override that its attention functions look for in their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.hosts.calls import Calls
from happyhorse_fast.hosts.sparse import Chosen

OPTION = "optimized_attention_override"
_KNOWN = {"attn_precision", "enable_gqa", "low_precision_attention", "scale", "transformer_options"}
"""Arguments beside those named below that change nothing here, or are taken: sums are float32 whatever is asked for."""
Attention = Callable[..., Tensor]


def override(calls: Calls, before: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """A function for ``transformer_options["optimized_attention_override"]``.

    ComfyUI calls it with the attention function that it would have called, and that one's arguments.

    Args:
        calls: Takes what fits.
        before: The override that was there, which gets what does not fit; None: the attention function does.
    """

    def happyhorse_fast(func: Attention, *args: Any, **kwargs: Any) -> Tensor:
        def own() -> Tensor:
            return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)

        return _attend(calls, own, *args, **kwargs)

    happyhorse_fast.calls = calls  # type: ignore[attr-defined]
    return happyhorse_fast


def enable(
    model: Any,
    *,
    backend: str = "auto",
    strict: bool = False,
    sparsity: BlockMap | Chosen | None = None,
    float16: bool = False,
) -> tuple[Any, Calls]:
    """A clone of a model whose attention runs here wherever a call fits; the model itself stays as it is.

    Args:
        model: ComfyUI's ``ModelPatcher``, which a node's MODEL is.
        backend: As for :class:`Calls`.
        strict: Raise where a call does not fit.
        sparsity: As for :class:`Calls`; None: exact.
        float16: As for :class:`Calls`.

    Returns:
        The clone, and its calls, counted.

    Raises:
        TypeError: ``model`` does not clone, or has no options.
    """
    if not hasattr(model, "clone") or not isinstance(getattr(model, "model_options", None), dict):
        raise TypeError(f"model must be a MODEL of ComfyUI, with clone() and model_options; got {type(model).__name__}")
    calls = Calls("ComfyUI", backend=backend, strict=strict, sparsity=sparsity, float16=float16)
    clone = model.clone()
    options = clone.model_options["transformer_options"] = dict(clone.model_options.get("transformer_options", {}))
    options[OPTION] = override(calls, options.get(OPTION))
    return clone, calls


def _attend(
    calls: Calls,
    own: Callable[[], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **others: Any,
) -> Tensor:
    """Attention of a call in ComfyUI's layouts.

    Args:
        calls: Takes it if it fits.
        own: What ComfyUI would have done, in its own layout.
        q: [B, N, Hq * D], or with ``skip_reshape`` [B, Hq, N, D].
        k: [B, M, Hkv * D], or [B, Hkv, M, D].
        v: As ``k``.
        heads: Hq.
        mask: bool or additive, [N, M], [B, N, M] or [B, Hq, N, M], as far as it does not broadcast.
        attn_precision: Without meaning here.
        skip_reshape: The layout of q, k and v.
        skip_output_reshape: The layout of the result: [B, Hq, N, D], else [B, N, Hq * D].
        others: Arguments that only some versions and models pass.
    """
    unknown = sorted(name for name in others if name not in _KNOWN and not name.startswith("_"))
    d = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    obstacle = f"argument {unknown[0]}" if unknown else None
    if any(x.dim() != (4 if skip_reshape else 3) or x.shape[-1] % d for x in (q, k, v)):
        obstacle = "query, key and value are laid out otherwise than skip_reshape says"
    if obstacle is not None:
        calls.leave(obstacle)
        return own()
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:  # as ComfyUI reads it: without a batch, then without heads
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    if skip_output_reshape:
        return calls(q, k, v, own, mask=mask, scale=others.get("scale"))
    by_heads = lambda: own().unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    return calls(q, k, v, by_heads, mask=mask, scale=others.get("scale")).transpose(1, 2).flatten(2)
