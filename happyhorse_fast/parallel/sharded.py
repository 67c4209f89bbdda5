"""Layers whose weights are spread over ranks and gathered one layer ahead, by torch's FSDP2 (``fully_shard``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_layer(layer: nn.Module, mesh: DeviceMesh, buffers: Sequence[str] = ()) -> None:
    """Keep 1/P of a layer's matrices on each of P ranks, on the mesh's device; they are whole while the layer runs.

    FSDP2 shards parameters and leaves buffers whole without a word, so ``buffers`` become parameters without gradients:
    [experts, F, ...], split along F. Matrices [F, K] that are parameters already are split along F too. Norms, and what
    P does not divide, stay whole on every rank.

    Args:
        layer: On any device.
        mesh: One-dimensional.
        buffers: Names of those that are matrices or their scales, of at least two dimensions.
    """
    from torch.distributed.fsdp import fully_shard  # here: its import takes 0.4 s, and no other call needs it
    from torch.distributed.tensor import Shard

    for name in buffers:
        value = layer.get_buffer(name)
        delattr(layer, name)
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    packed = {id(layer.get_parameter(name)) for name in buffers}

    def split(parameter: nn.Parameter) -> Shard:
        return Shard(1 if id(parameter) in packed else 0)

    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    whole = {p for p in layer.parameters() if p.dim() < 2 or p.shape[split(p).dim] % mesh.size()}
    for tensor in chain(whole, layer.buffers()):
        tensor.data = tensor.data.to(mesh.device_type)  # FSDP2 moves what it shards
    fully_shard(layer, mesh=mesh, reshard_after_forward=True, shard_placement_fn=split, ignored_params=whole)


def is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP2 made its class of the layer's."""
    return hasattr(layer, "unshard")


def gather_ahead(layers: Sequence[nn.Module] | nn.ModuleList, index: int) -> None:
    """Start to gather a layer that is to run next; nothing past the last, and where its weights are whole."""
    layer: Any = layers[index] if index < len(layers) else None
    if layer is not None and is_sharded(layer):
        layer.unshard(async_op=True)


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of weights that this rank holds."""
    return sum(local(x).nbytes for x in tensors)


def local(x: Any) -> torch.Tensor:
    """What this rank holds of a tensor, sharded (a DTensor) or whole."""
    part: torch.Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part
