"""The parameter of a CUDA kernel, made of an op's arguments."""

from __future__ import annotations

import ctypes
import re
from typing import Any, TypeVar

import torch

from happyhorse_fast.csrc import sources

NUMBERS = {"i64": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}
P = TypeVar("P", bound="Parameters")


class Parameters(ctypes.Structure):
    """Base of the structs of csrc/device/ that a kernel takes by value."""

    @classmethod
    def of(cls: type[P], given: object, **others: Any) -> P:
        """A struct of ``others``, and for members that they do not name of an op's arguments of the same name.

        A tensor is passed as its address.
        """
        values = {name: others[name] if name in others else getattr(given, name) for name, *_ in cls._fields_}
        pointers = {name: address(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return cls(**values | pointers)


def struct(name: str, file: str, **parts: type[Parameters]) -> type[Parameters]:
    """A struct as a file of csrc/device/ declares it.

    Args:
        name: Its name there.
        file: The file's name.
        parts: Structs that it has as members, by their names there.

    Raises:
        ValueError: There is none, or it has a member of another kind, such as an array.
        KeyError: A struct that it has as a member is not among ``parts``.
    """
    text = re.sub(r"//.*", "", (sources.DEVICE / file).read_text(encoding="utf-8"))
    body = text.partition(f"struct {name} {{")[2].partition("};")[0]
    declared = re.findall(r"(\w+)(\*?) ([\w, ]+);", body)
    if not declared or len(declared) != body.count(";"):
        raise ValueError(f"{file} must declare struct {name}, of pointers, numbers and structs alone")
    members: list[tuple[str, Any]] = []
    for kind, pointer, names in declared:
        of = ctypes.c_void_p if pointer else (NUMBERS | parts)[kind]
        members += [(member, of) for member in names.split(", ")]

    class Struct(Parameters):
        _fields_ = members

    return Struct


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's elements start; None, a null pointer, where there is no tensor or it is empty."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def require_vectors(count: int, **tensors: torch.Tensor | None) -> None:
    """Hold tensors against what vector loads need: rows of whole vectors, each aligned to its size.

    Args:
        count: Elements of a vector.
        tensors: By their argument's name.

    Raises:
        ValueError: A row or its address is not a multiple of ``count`` elements.
    """
    for name, tensor in tensors.items():
        if tensor is None or not tensor.numel():
            continue
        apart = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
        if tensor.shape[-1] % count or any(stride % count for stride in apart):
            raise ValueError(
                f"{name} must have rows of a multiple of {count} elements, a multiple of {count} apart, for backend "
                f"'cuda'; got shape {list(tensor.shape)}, strides {list(tensor.stride())}"
            )
        if tensor.data_ptr() % (count * tensor.element_size()):
            raise ValueError(
                f"{name} must start on a multiple of {count * tensor.element_size()} bytes for backend 'cuda', "
                f"got address {tensor.data_ptr():#x}"
            )
