"""Triton's interpreter made exact, for what it says about a kernel to mean something; kernels need no branch for it.

As shipped (3.6.0, 3.7.1) it multiplies and adds the raw bits of bf16, truncates float32 -> bf16 and wraps float32 ->
e4m3. :func:`make_exact` replaces those three places: dots and arithmetic on the exact values with float32
accumulation, casts to the nearest even, and e4m3 overflow as NaN, so that a kernel that forgets to clamp shows. Nor
does it keep NaN in a minimum or maximum that does not ask for it: a GPU does not. It also teaches it the one line of
PTX that a kernel has, and to add through a descriptor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interp
from triton._C.libtriton import ir

from happyhorse_fast.ops.runtime.triton.interpreter_memory import remember

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
}
# Triton dtype -> (numpy dtype to view its bits as on the way in, on the way out, torch dtype to view on the way out)
BITS = {
    tl.bfloat16: (np.int16, np.uint16, torch.int16),
    tl.float8e4nv: (np.uint8, np.uint8, torch.uint8),
}
ROUNDED = "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;"
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.minimum, np.maximum, np.fmin, np.fmax)


def to_torch(data: np.ndarray, dtype: Any) -> torch.Tensor:
    """The values of an interpreter array of a Triton dtype."""
    data = np.ascontiguousarray(data)
    if dtype in BITS:
        return torch.from_numpy(data.view(BITS[dtype][0]).copy()).view(TORCH[dtype])
    return torch.from_numpy(data.copy())


def to_numpy(tensor: torch.Tensor, dtype: Any) -> np.ndarray:
    """The interpreter's array for a tensor of a Triton dtype."""
    if dtype in BITS:
        return tensor.view(BITS[dtype][2]).numpy().view(BITS[dtype][1])
    return tensor.numpy()


_convert_as_shipped = interp._convert_float
_binary_as_shipped = interp.InterpreterBuilder.binary_op


def convert(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """Round to the nearest even; overflow of e4m3 becomes NaN."""
    if source not in TORCH or target not in TORCH:
        return _convert_as_shipped(data, source, target, rounding_mode)
    values = to_torch(data, source)
    if target == tl.float8e4nv:
        values = values.float()
        values = torch.where(values.abs() > 448, torch.nan, values)
    return to_numpy(values.to(TORCH[target]), target)


def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Product of the exact values, accumulated in float32; of int8 in int32, by way of float64, which is exact."""
    wide = torch.float64 if a.dtype.scalar == tl.int8 else torch.float32
    product = to_torch(a.data, a.dtype.scalar).to(wide) @ to_torch(b.data, b.dtype.scalar).to(wide)
    return interp.TensorHandle(product.numpy().astype(d.data.dtype) + d.data, d.dtype.scalar)


def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    """bf16 arithmetic on values instead of bits, rounded once."""
    dtype = lhs.dtype.scalar
    if dtype != tl.bfloat16 or op not in ARITHMETIC:
        return _binary_as_shipped(self, lhs, rhs, op)
    result = op(to_torch(lhs.data, dtype).float().numpy(), to_torch(rhs.data, dtype).float().numpy())
    return interp.TensorHandle(to_numpy(torch.from_numpy(np.asarray(result)).bfloat16(), dtype), dtype)


class Results(tuple[Any, ...]):
    """Results of a line of PTX, as Triton asks for them."""

    def get_result(self, place: int) -> Any:
        return self[place]


def assembly(self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Results:
    """float32 rounded to bf16, in bf16 and in float32; nothing else is known."""
    if (asm, constraints, pack) != (ROUNDED, "=r,=r,=r,f,f", 2):
        raise NotImplementedError(f"the interpreter does not know the assembly {asm!r}")
    rounded = torch.from_numpy(np.ascontiguousarray(values[0].data)).bfloat16()
    wide = interp.TensorHandle(rounded.float().numpy(), tl.float32)
    return Results((interp.TensorHandle(to_numpy(rounded, tl.bfloat16), tl.bfloat16), wide))


def log2(self: Any, value: Any) -> Any:
    """-inf of 0 without a warning, as on a GPU: the LSE of a row without a key."""
    with np.errstate(divide="ignore"):
        return self.unary_op(value, np.log2)


def descriptor_reduce(self: Any, kind: Any, desc: Any, value: Any, indices: Any) -> None:
    """A sum in place of what a descriptor holds, clipped at its bounds; no other reduction is known."""
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD:
        raise NotImplementedError(f"the interpreter does not know the reduction {kind}")
    places, mask = desc.materialize_pointers(indices)
    other = interp.TensorHandle(np.zeros_like(value.data), value.dtype.scalar)
    held = self.create_masked_load(places, mask, other, None, None, False)
    added = interp.TensorHandle(held.data + value.data, value.dtype.scalar)
    self.create_masked_store(places, added, mask, None, None)


def make_exact() -> None:
    """Install the replacements in this process; idempotent."""
    interp._convert_float = convert
    interp.InterpreterBuilder.create_dot = dot
    interp.InterpreterBuilder.binary_op = binary
    # min.f32 and max.f32: the number where one is NaN.
    interp.InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    interp.InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    interp.InterpreterBuilder.create_log2 = log2
    remember()
    interp.InterpreterBuilder.create_inline_asm = assembly
    interp.InterpreterBuilder.create_descriptor_reduce = descriptor_reduce
