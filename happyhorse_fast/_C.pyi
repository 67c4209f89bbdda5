"""The compiled host module, csrc/host/. :mod:`happyhorse_fast.ops.plan_blocks` calls it, and takes any integers.

All of it runs without the GIL, on copies of its arguments. Each function raises TypeError for anything but an int64
array of the stated shape, ValueError for values that are out of range, and MemoryError where a result does not fit.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_In: TypeAlias = npt.NDArray[np.int64]
_Out: TypeAlias = npt.NDArray[np.int32]

def from_ranges(q_ranges: _In, k_ranges: _In, queries: int, keys: int) -> tuple[_Out, _Out, _Out, _Out, _Out, _Out]:
    """The arrays of :meth:`BlockMap.from_ranges`, in the order of :meth:`BlockMap.tensors`; ranges are [rows, 2]."""

def frame_window(layouts: _In, receptive_field: int | None) -> tuple[_Out, _Out, _Out, _Out, _Out, _Out]:
    """The arrays of :meth:`BlockMap.frame_window`; layouts [clips, 6] hold the fields of ``Layout`` in their order."""

def schedule(lengths: _In, programs: int, query_heads: int = 1) -> tuple[_Out, _Out, _Out]:
    """The (order, starts, items) of :func:`happyhorse_fast.ops.plan_blocks.schedule`; lengths are [rows]."""
