"""Masks that hide keys from every query, as hosts pass for the padding of a prompt, as block maps."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from happyhorse_fast.block_map import BlockMap

REMEMBERED = 8
"""Masks whose maps are kept: a model passes the same one to every layer."""
Maps = list[BlockMap | None]
"""A map per item of the batch, or one for all; None where an item hides no key."""


class KeyMasks:
    """Block maps of key masks, read on the host once per mask: a wait for the device, at the first layer of a step.

    A mask that is made anew for every layer is read for every layer. So is one of inference mode, whose changes torch
    does not count.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], tuple[StorageWeakRef, Maps]] = OrderedDict()

    def obstacle(self, mask: Tensor, q: Tensor, k: Tensor) -> str | None:
        """Why a mask cannot be read; None where it can.

        Args:
            mask: bool, True for a key that is seen: [B, M], or what broadcasts to [B, Hq, N, M] from [B or 1, 1, 1, M].
            q: [B, Hq, N, D].
            k: [B, Hkv, M, D].
        """
        if mask.dtype != torch.bool:
            return f"attn_mask is {str(mask.dtype)[6:]}: only bool masks are read"
        shape = tuple(mask.shape)
        if shape != (q.shape[0], k.shape[2]) and not (
            mask.dim() == 4 and shape[0] in (1, q.shape[0]) and shape[1:] == (1, 1, k.shape[2])
        ):
            return "attn_mask differs by query or head: only masks of keys are read, [B, M] or [B, 1, 1, M]"
        if torch.compiler.is_compiling():
            return "attn_mask cannot be read while torch compiles"
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return "attn_mask cannot be read while a CUDA graph is captured"
        return None

    def maps(self, mask: Tensor, queries: int) -> Maps:
        """The maps of a mask without :meth:`obstacle`."""
        mask = mask.reshape(mask.shape[0], mask.shape[-1]) if mask.dim() == 2 else mask[:, 0, 0]
        if mask.is_inference():
            return _read(mask, queries)
        storage = StorageWeakRef(mask.untyped_storage())  # keeps the address from being given to another
        key = (storage.cdata, mask.storage_offset(), mask.shape, mask.stride(), mask._version, queries)
        if key not in self._known:
            self._known[key] = storage, _read(mask, queries)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key][1]


def _read(mask: Tensor, queries: int) -> Maps:
    rows = mask.cpu()
    if bool((rows == rows[:1]).all()):
        rows = rows[:1]
    return [_map(row, queries, mask.device) for row in rows]


def _map(row: Tensor, queries: int, device: torch.device) -> BlockMap | None:
    if bool(row.all()):
        return None
    edges = torch.cat([row.new_zeros(1), row, row.new_zeros(1)]).int().diff().nonzero().flatten()
    seen = edges.view(-1, 2).tolist()
    return BlockMap.from_ranges([(0, queries)] * len(seen), seen, queries, len(row)).to(device)
