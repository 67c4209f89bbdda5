"""vLLM-Omni's plugins: attention of its diffusion models by this package, and HappyHorse among those models.

vLLM-Omni lists its attention backends in a closed enumeration, whose members a plugin may give another class. The class
here is that member's own class with another `forward_cuda`: what does not fit runs as it would have, and whatever the
class says of itself (its name, masks, paged caches, platforms) stays true.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

from torch import Tensor

from happyhorse_fast.fast.config import TopK, TopP
from happyhorse_fast.hosts import versions
from happyhorse_fast.hosts.calls import Calls
from happyhorse_fast.hosts.key_masks import broadcast
from happyhorse_fast.hosts.sparse import Chosen

ENVIRONMENT = "HAPPYHORSE_FAST_VLLM_OMNI"
"""The member whose calls are taken, such as TORCH_SDPA; or "off"."""
DEFAULT = "FLASH_ATTN"
"""What vLLM-Omni takes by itself on Hopper."""
CLASS = "Backend_"
"""A class of this module by the member's name: ``Backend_FLASH_ATTN``."""
MEANT = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "valid_kv_length")
"""Keys of a call's ``extra`` that change its result; backends are to ignore what they do not know."""
CALLS = Calls("vLLM-Omni")
"""The calls of this process, counted."""
MODEL = "HappyHorseFastPipeline"
"""Name of the model among vLLM-Omni's, and of its class in `hosts.vllm_omni_model`."""
logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of the group ``vllm_omni.general_plugins``: installing this package is enabling it.

    In a vLLM-Omni of another interface it registers nothing and logs why: other models have to run there.

    Raises:
        ValueError: :data:`ENVIRONMENT` names no member.
    """
    name = os.environ.get(ENVIRONMENT, DEFAULT)
    if name == "off":
        return
    try:
        registry = _registry()
        _register_model()
    except ImportError as error:
        logger.warning("vLLM-Omni runs without happyhorse_fast: %s", error)
        return
    member = registry.DiffusionAttentionBackendEnum[name]
    ours = f"{__name__}.{CLASS}{name}"
    if member.is_overridden() and member.get_path() != ours:
        logger.warning("vLLM-Omni runs attention itself: %s is %s already", name, member.get_path())
        return
    registry.register_diffusion_backend(member, ours)
    package = logging.getLogger("happyhorse_fast")
    if not package.hasHandlers():  # as vLLM-Omni's own: a worker sets up vLLM's alone, and would show no note
        package.parent = logging.getLogger("vllm")


def _register_model() -> None:
    """Add the model, and what a server may ask of it, which is not asked of its class."""
    registry = _interface("vllm_omni.diffusion.registry", "register_diffusion_model")
    metadata = _interface("vllm_omni.diffusion.model_metadata", "DiffusionModelMetadata", "_DIFFUSION_MODEL_METADATA")
    registry.register_diffusion_model(MODEL, f"{__name__}_model", MODEL)
    metadata._DIFFUSION_MODEL_METADATA[MODEL] = metadata.DiffusionModelMetadata(
        supports_multimodal_inputs=True, max_multimodal_image_inputs=1, final_output_type="video"
    )


def unregister() -> None:
    """Give every member that :func:`register` gave a class its own back, for models that are made from now on.

    The name :data:`MODEL` stays, which takes nobody's place.
    """
    for member in _registry().DiffusionAttentionBackendEnum:
        if member.is_overridden() and member.get_path().startswith(f"{__name__}.{CLASS}"):
            member.clear_override()
    logging.getLogger("happyhorse_fast").parent = logging.getLogger()


def sparse_attn(
    query: Tensor, key: Tensor, value: Tensor, params: dict[str, Any], is_causal: bool, softmax_scale: float
) -> Tensor:
    """Entry point ``happyhorse_fast`` of the group ``vllm_omni.sparse_attn``: blocks of keys chosen by q and k.

    Args:
        query: [B, N, Hq, D] bf16.
        key: [B, M, Hkv, D] bf16; where M is not N, attention is exact.
        value: As ``key``.
        params: ``keep``, the share of blocks that stay (:class:`TopK`; 0.25 where neither is given), or ``mass``
            (:class:`TopP`); other keys are ignored.
        is_causal: False.
        softmax_scale: Softmax scale.

    Returns:
        [B, N, Hq, D] bf16.

    Raises:
        ValueError: The call does not fit; there is no other to give it to.
    """
    calls = _sparse_calls(params.get("keep"), params.get("mass"), query.shape[1], CALLS.backend)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return calls(q, k, v, _nobody, is_causal=is_causal, scale=softmax_scale).transpose(1, 2)


sparse_attn.capabilities = {  # type: ignore[attr-defined]
    "supports_attention_mask": False,
    "supports_full_attn_spans": False,
}


def _nobody() -> Tensor:
    raise AssertionError("a strict call was left")


@functools.lru_cache(maxsize=8)
def _sparse_calls(keep: float | None, mass: float | None, tokens: int, backend: str) -> Calls:
    if keep is not None and mass is not None:
        raise ValueError(f"params must have keep or mass, got keep={keep} and mass={mass}")
    policy = TopP(mass) if mass is not None else TopK(0.25 if keep is None else keep)
    return Calls("vLLM-Omni", backend=backend, strict=True, sparsity=Chosen(policy, tokens))


def __getattr__(name: str) -> Any:
    if not name.startswith(CLASS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _backend(name.removeprefix(CLASS))


def _interface(module: str, *names: str) -> Any:
    import vllm_omni

    return versions.interface("vllm-omni", vllm_omni.__version__, module, *names)


def _registry() -> Any:
    names = ("DiffusionAttentionBackendEnum", "register_diffusion_backend")
    return _interface("vllm_omni.diffusion.attention.backends.registry", *names)


@functools.cache
def _backend(name: str) -> type:
    """The class of a member with attention that is tried here first."""
    module, _, own = _registry().DiffusionAttentionBackendEnum[name].value.rpartition(".")
    base = getattr(importlib.import_module(module), own)
    base_impl = base.get_impl_cls()

    class Impl(base_impl):  # type: ignore[misc,valid-type]
        @classmethod
        def __subclasshook__(cls, other: type) -> Any:
            """A model's own implementation of this member is one of the member's, and has not heard of this one."""
            return True if cls is Impl and base_impl in other.__mro__ else NotImplemented

        def forward_cuda(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
            own = super().forward_cuda
            out = CALLS(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                lambda: own(query, key, value, attn_metadata).transpose(1, 2),
                mask=broadcast(getattr(attn_metadata, "attn_mask", None), query.shape[0], key.shape[1], by_item=True),
                is_causal=self.causal,
                scale=self.softmax_scale,
                obstacle=_obstacle(attn_metadata),
            )
            return out.transpose(1, 2)

    class Backend(base):  # type: ignore[misc,valid-type]
        @staticmethod
        def get_impl_cls() -> type:
            return Impl

    Impl.__name__ = Impl.__qualname__ = f"HappyHorseFast{base_impl.__name__}"
    Backend.__name__ = Backend.__qualname__ = CLASS + name
    return Backend


def _obstacle(metadata: Any) -> str | None:
    """Why a call's metadata keep it from being one attention over all of its keys."""
    if metadata is None:
        return None
    for name in ("full_attn_spans", "packed_padding", "joint_query"):
        if getattr(metadata, name, None) is not None:
            return f"metadata with {name}"
    meant = [name for name in MEANT if metadata.extra.get(name) is not None]
    if meant:
        return f"metadata with {meant[0]}"
    if metadata.extra.get("kv_cache_dtype") not in (None, "float"):
        return f"keys and values in {metadata.extra['kv_cache_dtype']}"
    return None
