"""Remembers what Triton's interpreter (3.6.0, 3.7.1) works out anew at every step of a kernel.

Values are the same: a launch of attention takes half of the time. As shipped, each call of a device function looks
through all of ``triton.language``, each tensor checks its shape and wraps it in types, and each cast makes a table of
dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interp

_patch_as_shipped = interp._patch_lang
_np_dtype_as_shipped = interp._get_np_dtype
_block_as_shipped = tl.block_type.__init__
_tensor_as_shipped = tl.tensor.__init__

_patched: list[Any] = []
"""Modules that this launch has replaced the functions of."""
_shapes: dict[tuple[int, ...], tuple[Any, int, str]] = {}
"""Of a block: its shape as Triton's tuple, its elements, its shape in words."""
_wrapped: dict[tuple[int, ...], tuple[Any, Any]] = {}
"""Of a tensor: its shape and its elements as Triton's constants."""
_np_dtypes: dict[str, np.dtype[Any]] = {}


def patch_lang(function: Any) -> Any:
    """Replace Triton's functions once a launch, not at each call of a device function; a third of the time."""
    langs = [x for x in function.__globals__.values() if x is tl or x is tl.core]
    if langs and all(any(x is known for known in _patched) for x in langs):
        return interp._LangPatchScope()
    outermost = not _patched
    scope = _patch_as_shipped(function)
    _patched.extend(langs)
    if outermost:  # of those inside, which the interpreter forgets, nothing is restored

        def restore(shipped: Any = scope.restore) -> None:
            _patched.clear()
            shipped()

        scope.restore = restore
    return scope


def np_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype for an element's or a block's, by its name."""
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    found = _np_dtypes.get(element.name)
    if found is None:
        found = _np_dtypes[element.name] = _np_dtype_as_shipped(dtype)
    return found


def make_block(self: Any, element_ty: Any, shape: Any) -> None:
    """Type of a block whose shape was checked before."""
    sizes = tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)
    found = _shapes.get(sizes)
    # What is refused still is: 1.0, which is 1 as a key, and Python's tuples.
    if found is None or not isinstance(shape, (list, tl.tuple)) or not all(type(s) is int for s in sizes):
        _block_as_shipped(self, element_ty, shape)
        _shapes[sizes] = self.shape, self.numel, str(self.shape)
        return
    self.element_ty = element_ty
    self.shape, self.numel, words = found
    self.name = f"<{words}, {element_ty}>"


def make_tensor(self: Any, handle: Any, type: Any) -> None:
    """A tensor of a shape that was wrapped before."""
    sizes = tuple(type.shape) if type.is_block() else ()
    found = _wrapped.get(sizes)
    if found is None:
        _tensor_as_shipped(self, handle, type)
        _wrapped[sizes] = self.shape, self.numel
        return
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = found


def remember() -> None:
    """Install the replacements in this process; idempotent."""
    interp._patch_lang = patch_lang
    interp._get_np_dtype = np_dtype
    tl.block_type.__init__ = make_block
    tl.tensor.__init__ = make_tensor
