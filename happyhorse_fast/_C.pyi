"""The compiled host module, csrc/host/. :meth:`BlockMap.from_ranges` calls it, and takes any integers."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_In: TypeAlias = npt.NDArray[np.int64]
_Out: TypeAlias = npt.NDArray[np.int32]

def from_ranges(q_ranges: _In, k_ranges: _In, queries: int, keys: int) -> tuple[_Out, _Out, _Out, _Out, _Out, _Out]:
    """The arrays of :meth:`BlockMap.from_ranges`, in the order of :meth:`BlockMap.tensors`; ranges are [rows, 2].

    Runs without the GIL, on copies of its arguments.

    Raises:
        TypeError: Ranges are anything but an int64 array of this shape.
        ValueError: A value is out of range.
        MemoryError: The result does not fit.
    """
