"""Runs a Gluon kernel for Hopper on the CPU: Triton's interpreter knows no Gluon.

    kernel = Emulated(["attention_hopper"], "block_sparse_attention_hopper_kernel", seed=1)
    kernel[(4,)](*arguments, STAGES=2, num_warps=4)

The sources are run with `gl` and Hopper's modules replaced by what is in this file; layouts are ignored, because the
compiler checks them. What a GPU would punish, and plain execution lets pass, raises :class:`EmulationError`:

- The partitions of `warp_specialize` and the copy engine take turns in an order drawn from ``seed``, and change at
  every barrier, copy and product. Where nobody can go on, that is a deadlock, said with where each stands.
- A copy poisons where it goes when it is issued, and lands later. A product's operands in shared memory must be the
  same when it is issued and when it is waited for. Neither may be under way when the program ends.
- A result of a product cannot be used before it was waited for, and waits retire products in their order. One that adds
  to nothing poisons what it is to be written over.
- An mbarrier counts arrivals and bytes; too many of either, or a use before `fence_async_shared`, raises.
- A named barrier counts warps; more in a phase than it was said to have, another number of them, or the same ones twice
  raise, and so does a product that is issued after its group let the other one issue its own.
- A load or store outside of its tensor raises, as does one at an address that nothing allocated.
- float32 -> e4m3 beyond 448 is NaN, so that a missing clamp shows.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from gluon_assembly import assembly
from gluon_machine import (
    PRODUCTS,
    Barrier,
    Described,
    DType,
    EmulationError,
    Memory,
    Pointer,
    Product,
    Program,
    Value,
    value,
)

POISON = 2.0**30
"""More than any score, in float32 and in int32."""
__all__ = ["Emulated", "EmulationError"]


class Emulated:
    """A kernel of a module, launched as Triton's are: ``kernel[grid](...)``."""

    def __init__(
        self, modules: Sequence[str], name: str, seed: int = 0, replace: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Load Gluon modules of ``happyhorse_fast.kernels``, each before those that import it.

        Args:
            modules: Their names.
            name: The kernel, in the last of them.
            seed: Draws the order of everything; odd: copies land as late as they can.
            replace: (text, other text) to plant a bug; the text must be there once.
        """
        self.rng, self.late = random.Random(seed), seed % 2 == 1
        self.program = Program(0, 1, self.rng, self.late)
        self.kernel: Any = self._load(modules, replace)[name]

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int = 4, enable_fp_fusion: bool = True, **constants: Any) -> None:
            order = list(range(grid[0]))
            self.rng.shuffle(order)
            for index in order:
                self.program = Program(index, grid[0], self.rng, self.late)
                self.warps = num_warps
                self.kernel(*map(_argument, arguments), **constants)

        return launch

    def _load(self, modules: Sequence[str], replace: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The last module's names, the sources run against this file's stand-ins, with some of their text replaced."""
        root = "triton.experimental.gluon"
        gluon, language = types.ModuleType(root), self._language()
        vars(gluon).update(jit=lambda f: _rebound(f, language), constexpr_function=lambda f: f, language=language)
        stand_ins = {root: gluon, f"{root}.language": language, f"{root}.language.nvidia.hopper": self._hopper()}
        sources, files = {}, {}
        for module in (f"happyhorse_fast.kernels.{m}" for m in modules):
            spec = importlib.util.find_spec(module)
            assert spec is not None and spec.origin is not None, module
            sources[module], files[module] = Path(spec.origin).read_text(), spec.origin
        for old, new in replace:
            found = [module for module, source in sources.items() if old in source]
            assert len(found) == 1 == sources[found[0]].count(old), f"{old!r} does not stand there once"
            sources[found[0]] = sources[found[0]].replace(old, new)
        package = importlib.import_module("triton.experimental")
        with mock.patch.dict(sys.modules, stand_ins), mock.patch.object(package, "gluon", gluon, create=True):
            for module, source in sources.items():
                made = sys.modules[module] = types.ModuleType(module)
                made.__file__ = files[module]
                exec(compile(source, module, "exec"), vars(made))
                vars(made).update({name: _plain(content) for name, content in vars(made).items()})
        return vars(made)

    def _language(self) -> types.ModuleType:
        gl = types.ModuleType("gl")

        def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
            flat, index, used = pointer.elements(mask)
            taken = flat[index]
            return torch.where(used, taken, torch.as_tensor(other, dtype=taken.dtype)).as_subclass(Value)

        def store(pointer: Pointer, data: Any, mask: Any = None) -> None:
            flat, index, used = pointer.elements(mask)
            data, _ = torch.broadcast_tensors(torch.as_tensor(data).as_subclass(torch.Tensor), index)
            if data.dtype != flat.dtype and not (data.dtype == torch.float32 and flat.dtype == torch.float32):
                raise EmulationError(f"{data.dtype} stored into {flat.dtype}")
            raw, bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[flat.element_size()], index[used]
            flat.view(raw)[bits] = data.contiguous().view(raw)[used]

        def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Memory:
            kind = dtype if isinstance(dtype, DType) else DType(dtype)
            raw = torch.full([int(n) for n in shape], 0x7F, dtype=torch.uint8)
            raw = raw.repeat_interleave(kind.primitive_bitwidth // 8, dim=-1)
            return Memory(raw.view(kind.torch), kind, layout, turn=lambda at: self.program.turn(at))

        def whole(shape: Sequence[int], fill: float, dtype: torch.dtype, layout: Any = None) -> Any:
            return value(torch.full([int(n) for n in shape], fill, dtype=dtype))

        names: dict[str, Any] = {
            "constexpr": lambda x: x,
            "load": load,
            "store": store,
            "allocate_shared_memory": allocate,
            "full": whole,
            "arange": lambda a, b, layout=None: value(torch.arange(a, b, dtype=torch.int32)),
            "where": lambda c, a, b: torch.where(c, *_pair(a, b)),
            "maximum": lambda a, b, **nan: (torch.maximum if _keeps(**nan) else torch.fmax)(*_pair(a, b)),
            "minimum": lambda a, b, **nan: (torch.minimum if _keeps(**nan) else torch.fmin)(*_pair(a, b)),
            "PropagateNan": tl.PropagateNan,
            "max": lambda x, axis: x.amax(dim=axis),
            "sum": lambda x, axis: x.sum(dim=axis),
            "reduce": lambda x, axis, combine: functools.reduce(combine, x.unbind(dim=axis)),
            "abs": torch.abs,
            "exp": torch.exp,
            "exp2": torch.exp2,
            "rsqrt": torch.rsqrt,
            "log2": torch.log2,
            "convert_layout": lambda x, layout: x,
            "reshape": lambda x, shape: x.reshape(shape),
            "permute": lambda x, order: x.permute(order),
            "static_range": range,
            "program_id": lambda axis: self.program.index,
            "num_programs": lambda axis: self.program.grid,
            "warp_specialize": lambda functions, warps, _: self.program.specialize(functions, [self.warps, *warps]),
            "inline_asm_elementwise": lambda *arguments: assembly(self.program, *arguments),
            "split": lambda x: tuple(part.contiguous() for part in x.unbind(dim=-1)),
            "join": lambda a, b: torch.stack((a, b), dim=-1).as_subclass(Value),
            "int8": torch.int8,
            "int16": torch.int16,
            "float16": torch.float16,
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float8e4nv": torch.float8_e4m3fn,
            "int32": torch.int32,
            "int64": torch.int64,
        }
        for layout in ("NVMMADistributed", "DotOperand", "Slice", "Blocked", "SharedLinear"):
            names[f"{layout}Layout"] = lambda *a, **k: None
        for name, content in names.items():
            setattr(gl, name, content)
        return gl

    def _hopper(self) -> types.ModuleType:
        hopper, barriers, tma = types.ModuleType("hopper"), types.ModuleType("mbarrier"), types.ModuleType("tma")

        def fence() -> None:
            self.program.fenced = True

        def init(memory: Memory, count: int) -> None:
            if self.program.current is not None:
                raise EmulationError("an mbarrier initialised in a partition")
            memory.barriers[memory.key] = Barrier(int(count))

        def wait(memory: Memory, phase: Any) -> None:
            barrier, parity = memory.barrier, int(phase)
            self.program.turn(f"a wait for parity {parity}", lambda: barrier.phase % 2 != parity)

        def arrive(memory: Memory, count: int = 1) -> None:
            self.program.turn("an arrival")
            memory.barrier.update(count, 0)

        def expect(memory: Memory, bytes: int) -> None:
            self.program.turn("an expectation")
            memory.barrier.update(1, int(bytes))

        def copy(source: Described, at: Sequence[Any], barrier: Memory, to: Memory) -> None:
            self.program.turn("a copy")
            if not self.program.fenced:
                raise EmulationError("a copy before fence_async_shared")
            if list(to.data.shape) != source.block_type.shape or to.dtype != source.dtype:
                raise EmulationError(f"a copy of {source.block_type.shape} into {list(to.data.shape)}")
            tile, raw = source.tile(at), to.data.view(torch.uint8)
            raw.fill_(0x7F)  # NaN in every format

            def land() -> None:
                raw.copy_(tile.view(torch.uint8))
                barrier.barrier.update(0, -source.block_type.nbytes)

            self.program.copies.append(land)

        def product(a: Any, b: Memory, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
            self.program.turn("a product")
            assert self.program.current is not None
            queue = self.program.current.products
            pending = isinstance(acc, Product) and acc.result is None
            # One that is under way may be added to, and nothing else.
            if isinstance(a, Product) or (pending and not (use_acc and any(acc is made for made in queue))):
                raise EmulationError("a product reads a result that was not waited for")
            left = a.data if isinstance(a, Memory) else a
            if left.shape[1] != b.data.shape[0] or list(acc.shape) != [left.shape[0], b.data.shape[1]]:
                raise EmulationError(f"a product of {list(left.shape)} and {list(b.data.shape)} into {list(acc.shape)}")
            if left.dtype != b.data.dtype:
                raise EmulationError(f"a product of {left.dtype} and {b.data.dtype}")
            whole = torch.int32 if left.dtype == torch.int8 else torch.float32
            if acc.dtype != whole:
                raise EmulationError(f"a product of {left.dtype} into {acc.dtype}")
            started = acc if use_acc else torch.zeros(list(acc.shape), dtype=whole)
            if not isinstance(started, Product):
                started = started.clone()
            if not use_acc and not isinstance(acc, Product):  # what was in its registers is gone
                acc.fill_(POISON)
            made = Product(a, b, started, (left.clone(), b.data.clone()), list(acc.shape), whole)
            if self.program.current.passed:
                raise EmulationError("a product behind the turn that was passed")
            queue.append(made)
            return made

        def await_products(outstanding: int, deps: Sequence[Product]) -> Any:
            self.program.turn(PRODUCTS)
            assert self.program.current is not None
            queue = self.program.current.products
            if outstanding == 0:
                self.program.current.passed = False
            while len(queue) > outstanding:
                first = queue.pop(0)
                now = (first.a.data if isinstance(first.a, Memory) else first.a, first.b.data)
                for before, after in zip(first.seen, now, strict=True):
                    if not torch.equal(_bits(before), _bits(after)):
                        raise EmulationError("an operand changed while a product read it")
                started = first.acc.result if isinstance(first.acc, Product) else first.acc
                started = started.as_subclass(torch.Tensor)
                left, right = (x.as_subclass(torch.Tensor).to(started.dtype) for x in first.seen)
                first.result = (left @ right + started).as_subclass(Value)
            # What is still under way may be added to, and nothing else.
            results = [d.result if isinstance(d, Product) and d.result is not None else d for d in deps]
            return results[0] if len(results) == 1 else tuple(results)

        barriers.MBarrierLayout = lambda: None  # type: ignore[attr-defined]
        for module, names in (
            (barriers, {"init": init, "wait": wait, "arrive": arrive, "expect": expect}),
            (tma, {"async_copy_global_to_shared": copy}),
            (hopper, {"mbarrier": barriers, "tma": tma, "fence_async_shared": fence}),
            (hopper, {"warpgroup_mma": product, "warpgroup_mma_wait": await_products}),
        ):
            for name, content in names.items():  # type: ignore[attr-defined]
                setattr(module, name, content)
        return hopper


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(torch.Tensor).contiguous().view(torch.uint8)


def _pair(a: Any, b: Any) -> tuple[Any, Any]:
    """Two operands, of which one may be a number."""
    like = a if isinstance(a, torch.Tensor) else b
    if not isinstance(like, torch.Tensor):
        return value(a), value(b)
    return tuple(x if isinstance(x, torch.Tensor) else value(x, like.dtype) for x in (a, b))  # type: ignore[return-value]


def _keeps(propagate_nan: Any = tl.PropagateNan.NONE) -> bool:
    """Whether a minimum or maximum gives NaN where an operand is: else it is the other one, as the hardware has it."""
    return bool(propagate_nan == tl.PropagateNan.ALL)


def _plain(x: Any) -> Any:
    return x.value if isinstance(x, tl.constexpr) else x


def _argument(x: Any) -> Any:
    """A launcher's argument in the kernel."""
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    return Described(x) if hasattr(x, "block_shape") else x


def _rebound(function: Any, language: types.ModuleType) -> Any:
    """A function of the module itself as it is; one of another module, and what it calls there, with `tl` replaced."""
    names = function.__globals__
    if "tl" not in names:
        return function
    scope = {n: _plain(x) for n, x in names.items()} | {"tl": language}

    def bound(f: Any) -> Any:
        return types.FunctionType(f.__code__, scope, f.__name__, f.__defaults__)

    jitted = {n: x.fn for n, x in names.items() if getattr(getattr(x, "fn", None), "__globals__", None) is names}
    scope.update({n: bound(f) for n, f in jitted.items()})
    return bound(function)
