"""Spread a model's sequence over the ranks of a device mesh."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from happyhorse_fast import ambient
from happyhorse_fast.arguments import real_number
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.compiled import unwrapped
from happyhorse_fast.fast.layer import FastLayer
from happyhorse_fast.fast.state import is_accelerated
from happyhorse_fast.parallel.faults import Meeting, versions, weights_digest
from happyhorse_fast.parallel.group import Ranks
from happyhorse_fast.parallel.sharded import is_sharded, shard_layer

Model = TypeVar("Model", bound=nn.Module)
TIMEOUT = 600.0
"""Seconds that a rank may keep the others waiting, unless told otherwise; a first call may compile kernels."""


@ambient.makes_tensors
def parallelize(model: Model, mesh: Any, *, shard_weights: bool = False, timeout: float = TIMEOUT) -> Model:
    """Share every clip's sequence among the ranks of a mesh (Ulysses context parallel), in place.

    Every rank calls this with a model of the same weights, and then the model with the same full inputs; every rank
    gets the full result. Between attentions a rank holds and computes its rows alone, within attention all rows of its
    heads. ``restore`` undoes it, and ``accelerate`` with it.

    Args:
        model: A :class:`HappyHorse`, or an accelerated model of either signature.
        mesh: One-dimensional ``torch.distributed.device_mesh.DeviceMesh`` on the model's kind of device, such as
            ``init_device_mesh("cuda", (4,))``.
        shard_weights: Keep 1/P of every layer's matrices on a rank (FSDP2), and gather a layer while the one before it
            runs; else every rank has all weights. An eager model on the CPU then moves to the mesh's devices layer by
            layer, and has no ``restore``. A model that no device can hold comes from ``load(shard=mesh)``.
        timeout: Seconds that a rank may keep the others waiting.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` or ``mesh`` is of another type.
        ValueError: The mesh has several dimensions, is of another kind of device, does not hold this process, or its
            ranks do not divide the key/value heads; the model is parallelized already; or ranks differ in versions,
            configuration, acceleration or weights. The message names them.
        RankError: A rank did not come in time; the message names it.
    """
    inner: Any = unwrapped(model)
    fast = is_accelerated(inner)
    if not fast and not isinstance(inner, HappyHorse):
        raise TypeError(
            f"model must be a HappyHorse or an accelerated model, got {type(inner).__name__}: call accelerate(model) "
            "first, with the public implementation's own context parallelism off (cp_size=1)"
        )
    require_mesh(mesh)
    if ranks_of(inner) is not None:
        raise ValueError("model is parallelized already; call restore(model) first")
    config: ModelConfig = inner.fast.config if fast else inner.config
    device = next(inner.parameters()).device
    seconds = real_number(timeout)
    if seconds is None or not seconds > 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
    if mesh.device_type != device.type and not (shard_weights and device.type == "cpu" and not fast):
        raise ValueError(f"mesh must be of {device.type} devices, where the model is; got {mesh.device_type}")
    meeting = Meeting.of(mesh, seconds)
    facts = versions() | {f"config.{key}": str(value) for key, value in config.to_dict().items()}
    facts |= {"fast": repr(inner.fast.fast) if fast else f"eager in {inner.compute_dtype}"}
    facts |= {"shard_weights": str(shard_weights or is_sharded(inner.block.layers[0]))}
    if fast:
        facts |= {f"backend of {op}": choice.backend for op, choice in inner.fast.choices.items()}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    with meeting.call():
        meeting.agree(facts | {"weights": weights_digest(inner)})
    config.require_ranks(mesh.size())  # all ranks have the same, so all raise
    ranks = Ranks(mesh.get_group(), meeting)
    if shard_weights:
        for layer in inner.block.layers:
            spread(layer, mesh)
        inner.to(mesh.device_type)
    if fast:
        inner.fast.ranks = ranks
        inner.fast.forget()
    else:
        inner.ranks = ranks
    return model


def require_mesh(mesh: object) -> None:
    """Raise a TypeError or ValueError where a mesh is no one-dimensional ``DeviceMesh`` with this process in it."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f'mesh must be a DeviceMesh, such as init_device_mesh("cuda", (4,)); got {type(mesh).__name__}')
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: {list(mesh.mesh.shape)}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must hold this process, got ranks {mesh.mesh.tolist()}")


def spread(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a layer's matrices over the ranks of a mesh, unless they are already."""
    if not is_sharded(layer):
        shard_layer(layer, mesh, layer.matrices() if isinstance(layer, FastLayer) else ())


def ranks_of(model: Any) -> Any:
    """The ranks that share a model's sequences; None for one process."""
    inner = unwrapped(model)
    return inner.fast.ranks if is_accelerated(inner) else getattr(inner, "ranks", None)
