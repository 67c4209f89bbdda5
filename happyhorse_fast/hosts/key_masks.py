"""Masks that hide keys from every query, as hosts pass for the padding of a prompt, as block maps."""

from __future__ import annotations

import functools
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

    A mask that is made anew for every layer is read, and waited for, at every layer. So is one of inference mode, whose
    changes torch does not count. Masks of one content share their maps.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], tuple[StorageWeakRef, Maps]] = OrderedDict()

    def obstacle(self, mask: Tensor, q: Tensor, k: Tensor) -> str | None:
        """Why a mask cannot be read; None where it can.

        Args:
            mask: bool, True for a key that is seen: [B or 1, 1, 1, M], which broadcasts to [B, Hq, N, M].
            q: [B, Hq, N, D].
            k: [B, Hkv, M, D].
        """
        if mask.dtype != torch.bool:
            return f"attn_mask is {str(mask.dtype)[6:]}: only bool masks are read"
        if mask.dim() != 4 or mask.shape[0] not in (1, q.shape[0]) or mask.shape[1:] != (1, 1, k.shape[2]):
            return "attn_mask differs by query or head: only masks of keys are read, [B or 1, 1, 1, M]"
        if torch.compiler.is_compiling():
            return "attn_mask cannot be read while torch compiles"
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return "attn_mask cannot be read while a CUDA graph is captured"
        return None

    def maps(self, mask: Tensor, queries: int) -> Maps:
        """The maps of a mask without :meth:`obstacle`."""
        mask = mask[:, 0, 0]
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


def broadcast(mask: Tensor | None, batch: int, keys: int, *, by_item: bool) -> Tensor | None:
    """A mask with the four dimensions that it broadcasts to, [B, Hq, N, M].

    Args:
        mask: bool or additive, of at most four dimensions; or None.
        batch: B.
        keys: M.
        by_item: Whether a mask [B, M] is of items and keys, as some hosts have it; PyTorch's would be [N, M].
    """
    if mask is None:
        return None
    if by_item and tuple(mask.shape) == (batch, keys):
        return mask[:, None, None]
    return mask[(None,) * (4 - mask.dim())]


def _read(mask: Tensor, queries: int) -> Maps:
    """The maps of a mask [B, M], by its content: some models make it anew for every layer."""
    rows = mask.cpu()
    if bool((rows == rows[:1]).all()):
        rows = rows[:1]
    return list(_maps(rows.contiguous().numpy().tobytes(), len(rows), queries, mask.device))


@functools.lru_cache(maxsize=REMEMBERED)
def _maps(seen: bytes, items: int, queries: int, device: torch.device) -> tuple[BlockMap | None, ...]:
    rows = torch.frombuffer(bytearray(seen), dtype=torch.bool).view(items, -1)
    return tuple(_map(row, queries, device) for row in rows)


def _map(row: Tensor, queries: int, device: torch.device) -> BlockMap | None:
    if bool(row.all()):
        return None
    edges = torch.cat([row.new_zeros(1), row, row.new_zeros(1)]).int().diff().nonzero().flatten()
    seen = edges.view(-1, 2).tolist()
    return BlockMap.from_ranges([(0, queries)] * len(seen), seen, queries, len(row)).to(device)
