"""The compiled host module, csrc/host/. :meth:`BlockMap.from_ranges` calls it, and checks what it is given."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_In: TypeAlias = npt.NDArray[np.int64]
_Out: TypeAlias = npt.NDArray[np.int32]

def from_ranges(q_ranges: _In, k_ranges: _In, queries: int, keys: int) -> tuple[_Out, _Out, _Out, _Out, _Out, _Out]:
    """The arrays of :meth:`BlockMap.from_ranges`, in the order of :meth:`BlockMap.tensors`; ranges [rows, 2], checked.

    Runs without the GIL, on copies of its arguments.

    Raises:
        ValueError: There are more blocks than int32 numbers, or more than 2^20 masks of partial ones.
        MemoryError: The result does not fit.
    """
