"""Layers whose weights are spread over ranks and gathered one layer ahead, by torch's FSDP2 (``fully_shard``)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from happyhorse_fast.parallel.faults import DIGEST, weights_digest

_INTEGERS = "2.13"

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_layer(layer: nn.Module, mesh: DeviceMesh, buffers: Sequence[str] = ()) -> None:
    """Keep 1/P of a layer's matrices on each of P ranks, on the mesh's device; they are whole while the layer runs.

    FSDP2 shards parameters and leaves buffers whole without a word, so ``buffers`` become parameters without gradients,
    [experts * F, ...]: split along any dimension but the first, they would be copied once more whenever they are
    gathered. Norms, and what P does not divide, stay whole on every rank.

    Args:
        layer: On any device.
        mesh: One-dimensional.
        buffers: Names of those that are matrices [experts, F, K] or their scales [experts, F].

    Raises:
        ValueError: One is int8, and torch is older than 2.13, whose FSDP2 takes no integers.
    """
    if torch.__version__ < _INTEGERS and any(layer.get_buffer(name).dtype == torch.int8 for name in buffers):
        raise ValueError(f"int8 weights spread over ranks need torch {_INTEGERS} or later, got {torch.__version__}")
    from torch.distributed.fsdp import fully_shard  # here: its import takes 0.4 s, and no other call needs it

    setattr(layer, DIGEST, weights_digest(layer))
    for name in buffers:
        value = layer.get_buffer(name).flatten(0, 1)
        delattr(layer, name)
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    packed = {id(layer.get_parameter(name)) for name in buffers}
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    norms = {p for p in layer.parameters() if p.dim() < 2 and id(p) not in packed}
    whole = norms | {p for p in layer.parameters() if len(p) % mesh.size()}
    for tensor in chain(whole, layer.buffers()):
        tensor.data = tensor.data.to(mesh.device_type)  # FSDP2 moves what it shards
    fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP2 made its class of the layer's."""
    return hasattr(layer, "unshard")


def gather(layers: Sequence[nn.Module] | nn.ModuleList, index: int) -> None:
    """Have a layer whole that is to run now, and start to gather the next; nothing where weights are whole.

    In this order two layers are there at a time: this one whole, and the next one as it arrives, or this one as it
    arrived.
    """
    for ahead, layer in enumerate(layers[index : index + 2]):
        if is_sharded(layer):
            there: Any = layer
            there.unshard(async_op=bool(ahead))


def local(x: Any) -> torch.Tensor:
    """What this rank holds of a tensor, sharded (a DTensor) or whole."""
    part: torch.Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part
