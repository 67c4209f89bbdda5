"""The strict interpreter: what a GPU would punish and Triton's interpreter lets pass, as four context managers.

    with strict(seed=0):              # all four
        result = op(...)

- :func:`permuted_grid`: programs run in a shuffled order, so that results can be compared bit by bit between orders.
- :func:`checked_memory`: every access that its mask lets through must fall inside the very argument it started from.
- :func:`checked_overflow`: int32 additions, subtractions and products that leave int32 raise.
- :func:`poisoned_outputs`: `torch.empty` and its relatives come filled with NaN (integers with their maximum).

A violation raises `triton.runtime.errors.InterpreterError`. A tensor with strides past 2^31 costs address space only,
as long as its pages are not touched: `torch.empty_strided((2, 64), (2**31 + 64, 1), dtype=torch.bfloat16)`, outside
:func:`poisoned_outputs`. Importing this module makes the interpreter exact as well.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import interpreter  # noqa: F401  (exact arithmetic)
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interp
from triton.language.semantic import TritonSemantic

# User-space addresses are below 2^47, so the upper 16 bits of a pointer can say which argument it started from, and
# pointer arithmetic carries them along.
TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)


@contextlib.contextmanager
def permuted_grid(seed: int) -> Iterator[None]:
    """Run the programs of every launch in an order drawn from ``seed``."""
    builder = interp.interpreter_builder
    order: list[int] = []

    def set_grid_dim(*dims: int) -> None:
        interp.InterpreterBuilder.set_grid_dim(builder, *dims)
        order[:] = range(dims[0] * dims[1] * dims[2])
        random.Random(seed).shuffle(order)

    def set_grid_idx(x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        rest, z = divmod(order[(x * ny + y) * nz + z], nz)
        interp.InterpreterBuilder.set_grid_idx(builder, *divmod(rest, ny), z)

    with mock.patch.multiple(builder, create=True, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
        yield


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor's elements and the one after the last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextlib.contextmanager
def checked_memory() -> Iterator[None]:
    """Raise on a load or store, of an element its mask lets through, outside the tensor argument it started from.

    The argument counts, not its storage: running past a view into its neighbour raises, and so does running past one
    tensor into another that happens to lie behind it.
    """
    arguments: list[tuple[int, int, str]] = []
    convert, executor = interp._implicit_cvt, interp.GridExecutor.__call__
    shipped = interp.InterpreterBuilder
    load, store = shipped.create_masked_load, shipped.create_masked_store
    rmw, cas = shipped.create_atomic_rmw, shipped.create_atomic_cas

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments.clear()
        executor(self, *args, **kwargs)

    def tag(arg: Any) -> Any:
        converted = convert(arg)
        if hasattr(arg, "data_ptr"):
            arguments.append((*_extent(interp._unwrap_tensor(arg)), f"{arg.dtype} {list(arg.shape)}"))
            converted.handle.data = converted.handle.data | (np.uint64(len(arguments)) << TAG_SHIFT)
        return converted

    def untag(pointers: Any, mask: Any, what: str) -> Any:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        tags, addresses = pointers.data >> TAG_SHIFT, pointers.data & ADDRESS
        # A mask joined with `&` is an int32 array of zeros and ones.
        enabled = np.broadcast_to(mask.data, addresses.shape).astype(bool)
        for number in np.unique(tags[enabled]):
            if not 0 < number <= len(arguments):
                raise IndexError(f"{what} through a pointer that started from no argument of this launch")
            first, end, name = arguments[int(number) - 1]
            used = addresses[enabled & (tags == number)].astype(np.int64)
            if used.min() < first or used.max() + width > end:
                span = f"bytes {used.min() - first} to {used.max() + width - first} of {end - first}"
                raise IndexError(f"{what} outside {name}: {span}")
        return interp.TensorHandle(addresses, pointers.dtype)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return load(self, untag(pointers, mask, "load"), mask, *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, untag(pointers, mask, "store"), value, mask, *rest)

    def atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return rmw(self, op, untag(pointers, mask, "atomic"), value, mask, *rest)

    def atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        everywhere = interp.TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)
        return cas(self, untag(pointers, everywhere, "atomic"), *rest)

    with (
        mock.patch.object(interp, "_implicit_cvt", tag),
        mock.patch.object(interp.GridExecutor, "__call__", launch),
        mock.patch.multiple(shipped, create_masked_load=masked_load, create_masked_store=masked_store),
        mock.patch.multiple(shipped, create_atomic_rmw=atomic_rmw, create_atomic_cas=atomic_cas),
    ):
        yield


@contextlib.contextmanager
def checked_overflow() -> Iterator[None]:
    """Raise where an int32 sum, difference or product in a kernel leaves int32; also makes `tl.device_assert` count.

    Pointer offsets are part of it: Triton adds them as given, so an int32 row times an int32 stride wraps silently.
    """
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        """As Triton's own, which builds seven tensors for it: a fifth of a launch's time."""
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64:
            return
        exact = operations[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        if exact.size and not dtype.get_int_min_value() <= exact.min() <= exact.max() <= dtype.get_int_max_value():
            raise OverflowError(f"int{dtype.int_bitwidth} overflow detected for operation {operation.__name__}")

    options = interp.InterpreterOptions(debug=True)
    with (
        mock.patch.object(interp.interpreter_builder, "options", options),
        mock.patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", check),
    ):
        yield


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill every uninitialised tensor made inside with NaN, or an integer's maximum: an unwritten output then shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def strict(seed: int = 0) -> Iterator[None]:
    """All four checks; ``seed`` draws the order of the programs."""
    with permuted_grid(seed), checked_memory(), checked_overflow(), poisoned_outputs():
        yield
