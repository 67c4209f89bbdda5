"""Attention of a diffusers model by this package: a backend of diffusers' own registry, chosen by that model alone."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from happyhorse_fast import optional
from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.hosts import versions
from happyhorse_fast.hosts.calls import Calls
from happyhorse_fast.hosts.key_masks import broadcast
from happyhorse_fast.hosts.sparse import Chosen

_CHOICE = "_attention_backend"
"""Attribute of a processor that names its backend; None: diffusers' active one."""


@dataclass
class _Enabled:
    """What :func:`disable` takes back: processors with the attribute they had, and entries of the registry."""

    processors: list[tuple[Any, bool, Any]] = field(default_factory=list)
    members: dict[Any, Any] = field(default_factory=dict)


_ENABLED: weakref.WeakKeyDictionary[nn.Module, _Enabled] = weakref.WeakKeyDictionary()
_NUMBERS = itertools.count()


def enable(
    transformer: nn.Module,
    *,
    backend: str = "auto",
    strict: bool = False,
    sparsity: BlockMap | Chosen | None = None,
    float16: bool = False,
) -> Calls:
    """Let a model's attention run here wherever a call fits (:class:`Calls`), and as before where it does not.

    Every model of diffusers whose processors dispatch by `_attention_backend`: Wan, LTX-2, HunyuanVideo, Flux,
    Qwen-Image and others. Other models, and diffusers' active backend, stay as they are.

    Args:
        transformer: Such as ``pipe.transformer``.
        backend: As for :class:`Calls`.
        strict: Raise where a call does not fit.
        sparsity: As for :class:`Calls`; None: exact.
        float16: As for :class:`Calls`.

    Returns:
        The calls, counted: ``print(calls)`` says what ran where, and why.

    Raises:
        ImportError: diffusers is missing, or its attention backends are not where the tested version has them.
        TypeError: ``transformer`` is no module.
        ValueError: It is enabled already, or none of its processors dispatches.
    """
    dispatch = _dispatcher()
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"transformer must be a module, such as pipe.transformer; got {type(transformer).__name__}")
    name = type(transformer).__name__
    if transformer in _ENABLED:
        raise ValueError(f"{name} is enabled already: disable it first")
    processors = (getattr(module, "processor", None) for module in transformer.modules())
    found = {id(processor): processor for processor in processors if hasattr(processor, _CHOICE)}
    if not found:
        raise ValueError(f"{name} has no attention processor with {_CHOICE}, by which diffusers chooses a backend")
    calls = Calls("diffusers", backend=backend, strict=strict, sparsity=sparsity, float16=float16)
    enabled = _Enabled()
    for processor in found.values():
        before = getattr(processor, _CHOICE)
        if before not in enabled.members:
            enabled.members[before] = _register(dispatch, calls, before)
        enabled.processors.append((processor, _CHOICE in vars(processor), before))
        setattr(processor, _CHOICE, enabled.members[before])
    _ENABLED[transformer] = enabled
    weakref.finalize(transformer, _forget, dispatch._AttentionBackendRegistry, enabled.members)
    return calls


def disable(transformer: nn.Module) -> None:
    """Give a model the backends back that it had; what was chosen since :func:`enable` stays.

    Raises:
        ValueError: It is not enabled.
    """
    if transformer not in _ENABLED:
        raise ValueError(f"{type(transformer).__name__} is not enabled")
    registry, enabled = _dispatcher()._AttentionBackendRegistry, _ENABLED.pop(transformer)
    for processor, own, before in enabled.processors:
        if getattr(processor, _CHOICE) is not enabled.members[before]:
            continue
        if own:
            setattr(processor, _CHOICE, before)
        else:
            delattr(processor, _CHOICE)
    _forget(registry, enabled.members)


def _forget(registry: Any, members: dict[Any, Any]) -> None:
    """Take entries out of diffusers' registry; also of a model that is gone without :func:`disable`."""
    for member in members.values():
        for entries in (registry._backends, registry._constraints, registry._supported_arg_names):
            entries.pop(member, None)


def _dispatcher() -> Any:
    """diffusers' module of attention backends.

    Raises:
        ImportError: It is not there, or has none of the names that are used of it.
    """
    optional.require("diffusers", "hosts.diffusers")
    import diffusers

    names = ("AttentionBackendName", "_AttentionBackendRegistry", "dispatch_attention_fn")
    return versions.interface("diffusers", diffusers.__version__, "diffusers.models.attention_dispatch", *names)


def _register(dispatch: Any, calls: Calls, before: Any) -> Any:
    """An entry of diffusers' registry that takes calls, or gives them to the backend ``before``.

    Its key has to be of the enumeration's type, which lists no name for others: a value of that type that is not one of
    its members.
    """
    kind = dispatch.AttentionBackendName
    member = str.__new__(kind, f"happyhorse_fast_{next(_NUMBERS)}")
    member._name_ = member._value_ = str.__str__(member)

    def happyhorse_fast(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        def own() -> Any:
            return dispatch.dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                {"return_lse": True} if return_lse else None,
                backend=before,
                parallel_config=_parallel_config,
            )

        if return_lse:
            calls.leave("return_lse")
            return own()
        out = calls(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            lambda: own().transpose(1, 2),
            mask=broadcast(attn_mask, query.shape[0], key.shape[1], by_item=True),
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            obstacle=None if _parallel_config is None else "context parallelism",
        )
        return out.transpose(1, 2)

    dispatch._AttentionBackendRegistry.register(member)(happyhorse_fast)
    return member
