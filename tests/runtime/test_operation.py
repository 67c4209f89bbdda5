"""An op's arguments as a dataclass: the function that torch.library takes, and the struct that a CUDA kernel takes."""

import ctypes
import inspect
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from happyhorse_fast import ops
from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda.parameters import struct
from happyhorse_fast.ops.runtime.operation import Arguments, flat


@dataclass(frozen=True)
class Scaled(Arguments):
    x: Tensor
    scale: Tensor | None
    steps: int
    name: str = "plain"

    def empty(self) -> Tensor:
        return torch.empty_like(self.x)


DEVICE = """constexpr int ROWS = 4;
struct Inner {
  int first, end;  // rows; end is not one
};
struct Params {
  const float* x;      // [N]
  const float* scale;  // or null
  void* y;
  Inner rows;
  i64 stride;
  int steps;
  float factor;
};
"""


def test_a_flat_function_has_the_fields_and_gives_them_to_the_dataclass():
    x = torch.ones(2)
    whole = flat(lambda given: given, Scaled)
    assert str(inspect.signature(whole)) == (
        "(x: torch.Tensor, scale: torch.Tensor | None, steps: int, name: str = 'plain') -> torch.Tensor"
    )
    assert whole(x, None, steps=3) == Scaled(x, None, 3, "plain")
    assert whole(x, None, 3, "other").values() == (x, None, 3, "other")
    with pytest.raises(TypeError):
        whole(x, None, 3, "other", "one too many")
    part = flat(lambda given: given, Scaled, without=("scale",))
    assert [*inspect.signature(part).parameters] == ["x", "steps", "name"]
    assert part(x, 3) == Scaled(x, None, 3)
    assert part(x, 3).values(without=("scale",)) == (x, 3, "plain")


def test_a_struct_takes_arguments_by_name_and_others_before_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEVICE", tmp_path)
    (tmp_path / "given.cu").write_text(DEVICE)
    Inner = struct("Inner", "given.cu")
    Params = struct("Params", "given.cu", Inner=Inner)
    x, y = torch.ones(4), torch.ones(4)
    assert [name for name, _ in Params._fields_] == ["x", "scale", "y", "rows", "stride", "steps", "factor"]
    given = Scaled(x, torch.empty(0), 3)
    made = Params.of(given, y=y, rows=Inner(first=1, end=2), stride=5, steps=7, factor=0.5)
    assert (made.x, made.scale, made.y) == (x.data_ptr(), None, y.data_ptr()), "an empty tensor is a null pointer"
    assert (made.rows.end, made.stride, made.steps, made.factor) == (2, 5, 7, 0.5)
    assert ctypes.sizeof(made) == 48
    with pytest.raises(AttributeError, match="'Scaled' object has no attribute 'y'"):
        Params.of(given, rows=Inner(), stride=5, factor=0.5)
    with pytest.raises(KeyError, match="Inner"):
        struct("Params", "given.cu")
    (tmp_path / "given.cu").write_text("struct Held { int n; float values[4]; };")
    for name in ("Held", "Absent"):
        with pytest.raises(ValueError, match=f"given.cu must declare struct {name}, of pointers, numbers"):
            struct(name, "given.cu")


@pytest.mark.parametrize("name", ["rmsnorm_quantize", "qkv_linear", "qk_norm_rope", "quantize_rows", "fp8_linear",
                                  "fp8_linear_residual", "fp8_linear_activation", "activation_quantize"])  # fmt: skip
def test_a_public_function_takes_what_its_op_takes(name):
    """In the op's order and with its defaults; besides only the backend."""
    schema = getattr(torch.ops.happyhorse_fast, f"{name}_reference").default._schema if getattr(ops, name) else None
    public = list(inspect.signature(getattr(ops, name)).parameters.values())
    assert public.pop().name == "backend"
    assert [p.name for p in public] == [argument.name for argument in schema.arguments]
    for ours, theirs in zip(public, schema.arguments, strict=True):
        assert (ours.default is not ours.empty) == theirs.has_default_value()
        assert not theirs.has_default_value() or ours.default == theirs.default_value
