"""A stand-in for a GPU: ops on CPU tensors launch as they would on one, are recorded, and give the reference's results.

So what runs on a GPU, self-checks, tests and models, runs to its end here, and every launch that it would make is seen.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.cases import BLOCK_SPARSE
from happyhorse_fast.ops.attention import reference as attention
from happyhorse_fast.ops.attention import triton as attention_launcher
from happyhorse_fast.ops.attention.reference import sparse_attention
from happyhorse_fast.ops.runtime import cache_folder, dispatch
from happyhorse_fast.ops.runtime.triton.device import pretend
from happyhorse_fast.ops.runtime.triton.library import LAUNCHERS


@contextlib.contextmanager
def stand_in(arch: int) -> Iterator[None]:
    """Inside, backend "triton" can run on the CPU and launches for a GPU of compute capability ``arch``.

    For :func:`bench.aot.recording.record`, without which a launch would look for a GPU. What self-checks find here is
    remembered nowhere.
    """
    with contextlib.ExitStack() as entered:
        entered.enter_context(pretend(arch))
        forgotten = entered.enter_context(tempfile.TemporaryDirectory())
        entered.enter_context(mock.patch.dict(os.environ, {cache_folder.CACHE_VARIABLE: forgotten}))
        entered.enter_context(mock.patch.object(dispatch, "triton_obstacle", return_value=None))
        entered.enter_context(mock.patch.object(dispatch, "INTERPRETED_IS_SLOW", None))
        entered.enter_context(mock.patch.object(torch.cuda, "set_sync_debug_mode"))
        for name, launcher in LAUNCHERS.items():
            module = importlib.import_module(launcher.__module__)
            entered.enter_context(mock.patch.object(module, launcher.__name__, launched(name, launcher)))
        yield


BOUNDED = slice(7, 9)
"""Of the arguments of `block_sparse_attention` behind q, k and v: whether the softmax is bounded, and the flag."""


def launched(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """An op in whose place the launcher is called on tensors without data, then the reference on those with."""
    reference = getattr(torch.ops.happyhorse_fast, f"{name.partition('::')[2]}_reference")

    def run(*arguments: Any, **named: Any) -> Any:
        shapes, named_shapes = tree_map_only(Tensor, without_data, (arguments, named))
        results = launcher(*shapes, **named_shapes)
        if all(x.is_meta for x in (*arguments, *named.values()) if isinstance(x, Tensor)):
            return results
        with _same_steps(*arguments) if launcher.__name__ == BLOCK_SPARSE else contextlib.nullcontext():
            return reference(*arguments, **named)

    return run


def _same_steps(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> contextlib.AbstractContextManager[object]:
    """Codes of P depend on the keys that share a running maximum, the kernel's own step."""
    bounded, flag = rest[BOUNDED]
    bounded = bounded if flag is None else bool(flag)
    config = attention_launcher.launch_config(q, k, v, bounded=bounded, lse=rest[-1])
    there = functools.partial(sparse_attention, **attention_launcher.rounding_of(config, v))
    return mock.patch.object(attention, "sparse_attention", there)


def without_data(x: Tensor) -> Tensor:
    """The same shape, strides and offset on the device "meta"."""
    if x.is_meta:
        return x
    size = x.untyped_storage().nbytes() // x.element_size()
    return torch.empty(size, dtype=x.dtype, device="meta").as_strided(x.shape, x.stride(), x.storage_offset())
