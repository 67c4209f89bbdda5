"""What a thread block is made of, for `gluon_emulator`: values, addresses, shared memory, mbarriers, partitions."""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

TIMEOUT = 60.0
PRODUCTS = "a wait for products"
RESERVED = 4
"""Named barriers that Triton may use for itself: one of the block, one to start partitions, one of each other."""
FORMATS = {
    torch.bfloat16: 16,
    torch.float16: 16,
    torch.float8_e4m3fn: 8,
    torch.int8: 8,
    torch.float32: 32,
    torch.int64: 64,
}


class EmulationError(RuntimeError):
    """The kernel did what a GPU would punish."""


@dataclass(frozen=True)
class DType:
    """A dtype as kernels ask about it."""

    torch: torch.dtype

    @property
    def primitive_bitwidth(self) -> int:
        return FORMATS[self.torch]

    def is_int(self) -> bool:
        return not self.torch.is_floating_point


class Value(torch.Tensor):
    """A tensor in registers; casts as the hardware's, of kernels that rely on neither saturation nor NaN."""

    def to(self, dtype: Any, bitcast: bool = False) -> Any:  # type: ignore[override]
        wanted = dtype.torch if isinstance(dtype, DType) else dtype
        plain = self.as_subclass(torch.Tensor)
        if bitcast:
            return plain.contiguous().view(wanted).as_subclass(Value)
        if wanted == torch.float8_e4m3fn:
            plain = torch.where(plain.abs() > 448, torch.nan, plain)
        return plain.to(wanted).as_subclass(Value)

    @property
    def type(self) -> Any:  # type: ignore[override]
        """What kernels ask of it: a layout, which is ignored."""
        return types.SimpleNamespace(layout=None)


def value(data: Any, dtype: torch.dtype | None = None) -> Any:
    """Data as a Value; Python numbers as 0-dimensional ones."""
    if isinstance(data, Product):
        raise EmulationError(UNFINISHED)
    return torch.as_tensor(data, dtype=dtype).as_subclass(Value)


class Pointer:
    """An address: a tensor's storage, and offsets into it in elements."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, other: Any) -> Pointer:
        if isinstance(other, torch.Tensor) and other.dtype not in (torch.int32, torch.int64):
            raise EmulationError(f"an address plus {other.dtype}")
        return Pointer(self.tensor, self.offset + other)

    def elements(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(flat tensor, indices, which of them are used); those not used are 0."""
        shape, strides = self.tensor.shape, self.tensor.stride()
        flat = self.tensor.as_strided((1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)),), (1,))
        index = torch.as_tensor(self.offset).as_subclass(torch.Tensor).long()
        used = torch.ones_like(index, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        index, used = torch.broadcast_tensors(index, used.as_subclass(torch.Tensor))
        if ((index < 0) | (index >= flat.numel()))[used].any():
            raise EmulationError(f"access to {index[used].tolist()[:4]}... of {flat.numel()} elements")
        return flat, torch.where(used, index, 0), used


@dataclass
class Barrier:
    """An mbarrier, or a named barrier: then arrivals are of warps."""

    count: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def update(self, arrivals: int, bytes: int) -> None:
        """Arrivals, and bytes that are expected (positive) or have landed (negative)."""
        self.pending -= arrivals
        self.bytes += bytes
        if self.pending < 0:
            raise EmulationError(f"more than {self.count} arrivals at a barrier in one phase")
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1


@dataclass
class Memory:
    """Shared memory: a descriptor of a whole allocation or of a part of it."""

    data: torch.Tensor
    dtype: DType
    layout: Any = None
    barriers: dict[int, Barrier] = field(default_factory=dict)
    turn: Callable[[str], None] = lambda at: None

    @property
    def key(self) -> int:
        return int(self.data.storage_offset())

    def part(self, data: torch.Tensor) -> Memory:
        return replace(self, data=data)

    def index(self, at: Any) -> Memory:
        if not 0 <= int(at) < len(self.data):
            raise EmulationError(f"part {int(at)} of {len(self.data)} in shared memory")
        return self.part(self.data[int(at)])

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return self.part(self.data.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Memory:
        return self.part(self.data.permute(*order))

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Memory:
        if FORMATS[dtype] != self.dtype.primitive_bitwidth:
            raise EmulationError(f"{self.dtype.torch} in shared memory as {dtype}")
        return replace(self, data=self.data.view(dtype).view(*shape), dtype=DType(dtype))

    def load(self, layout: Any) -> Any:
        self.turn("a load from shared memory")
        return self.data.clone().as_subclass(Value)

    def store(self, value: Any) -> None:
        """Write a tensor in two steps: who reads between them sees NaN."""
        if value.dtype != self.data.dtype or value.shape != self.data.shape:
            raise EmulationError(f"{value.dtype} {list(value.shape)} into {self.data.dtype} {list(self.data.shape)}")
        self.turn("a store to shared memory")
        self.data.fill_(torch.nan)
        self.turn("the rest of a store to shared memory")
        self.data.copy_(value.as_subclass(torch.Tensor))

    @property
    def barrier(self) -> Barrier:
        if self.key not in self.barriers:
            raise EmulationError("an mbarrier that was not initialised")
        return self.barriers[self.key]


@dataclass
class Described:
    """A tensor descriptor in the kernel."""

    source: Any

    def __post_init__(self) -> None:
        self.dtype = DType(self.source.base.dtype)
        self.layout = self.source.layout
        shape = [int(n) for n in self.source.block_shape]
        size = self.source.base.element_size()
        self.block_type = types.SimpleNamespace(shape=shape, nbytes=shape[0] * shape[1] * size)

    def tile(self, at: Sequence[Any]) -> torch.Tensor:
        """The block from ``at`` on, zeros outside of the tensor."""
        rows, columns = self.source.shape
        flat = self.source.base.as_strided((rows, columns), tuple(self.source.strides))
        row, column = (torch.arange(int(a), int(a) + n) for a, n in zip(at, self.block_type.shape, strict=True))
        inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None, :]
        raw = flat.view(torch.uint8).unflatten(1, (columns, -1))
        taken = raw[row.clamp(0, rows - 1)][:, column.clamp(0, columns - 1)]
        return torch.where(inside[..., None], taken, 0).flatten(1).contiguous().view(flat.dtype)


UNFINISHED = "a result used before its product was waited for"


@dataclass(eq=False)
class Product:
    """A product under way, whose result a later one may add to; any other use of it raises."""

    a: Any
    b: Memory
    acc: Any
    seen: tuple[torch.Tensor, torch.Tensor]
    shape: list[int]
    dtype: torch.dtype
    result: Any = None

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise EmulationError(UNFINISHED)

    def __getattr__(self, name: str) -> Any:
        raise EmulationError(UNFINISHED)

    def __mul__(self, other: Any) -> Any:
        raise EmulationError(UNFINISHED)


class Partition:
    """One partition's thread: it runs until it asks for a turn, and goes on when it is its turn."""

    def __init__(self, name: str, warps: int, run: Callable[[], None]) -> None:
        self.name, self.warps, self.run = name, warps, run
        self.go = threading.Event()
        self.ready: Callable[[], bool] = lambda: True
        self.at, self.done = "its start", False
        self.came: dict[int, int] = {}
        self.entered: tuple[int, int] | None = None
        self.passed = False
        self.error: BaseException | None = None
        self.products: list[Product] = []


class Program:
    """One program (thread block): its partitions, its shared memory and its copies."""

    def __init__(self, index: int, grid: int, rng: random.Random, late: bool) -> None:
        self.index, self.grid, self.rng, self.late = index, grid, rng, late
        self.partitions: list[Partition] = []
        self.current: Partition | None = None
        self.copies: list[Callable[[], None]] = []
        self.back = threading.Event()
        self.named: dict[int, Barrier] = {}
        self.fenced = False
        self.stopped = False

    def turn(self, at: str, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, and come back once ``ready``."""
        me = self.current
        if me is None:  # before the partitions
            return
        me.at, me.ready = at, ready
        me.go.clear()
        self.back.set()
        if not me.go.wait(TIMEOUT) or self.stopped:
            raise EmulationError("stopped")

    def come(self, number: int, threads: int, wait: bool) -> None:
        """The current partition's warps come to a named barrier (PTX `bar.sync` and `bar.arrive`).

        One that has waited at one such barrier and arrives at another of that size has passed its turn.
        """
        me = self.current
        if me is None:
            raise EmulationError("a named barrier before the partitions")
        if not RESERVED <= number < 16 or threads % 32:
            raise EmulationError(f"named barrier {number} of {threads} threads")
        self.turn(f"its arrival at named barrier {number}")
        barrier = self.named.setdefault(number, Barrier(threads // 32))
        if barrier.count != threads // 32:
            raise EmulationError(f"named barrier {number} of {threads} threads, and of {32 * barrier.count} before")
        if barrier.phase == me.came.get(number):
            raise EmulationError(f"{me.name} came to named barrier {number} twice in one phase")
        phase = barrier.phase
        me.came[number] = phase
        barrier.update(me.warps, 0)
        if wait:
            self.turn(f"a wait at named barrier {number}", lambda: barrier.phase != phase)
            me.entered, me.passed = (number, threads), False
        elif me.entered is not None and me.entered[1] == threads:
            me.passed = True

    def specialize(self, functions: Sequence[tuple[Callable[..., None], Sequence[Any]]], warps: Sequence[int]) -> None:
        """Run the partitions and the copy engine, one step of one of them after the other.

        Args:
            functions: Of each partition, and its arguments.
            warps: Of each partition.
        """
        for number, ((function, arguments), size) in enumerate(zip(functions, warps, strict=True)):
            run = lambda f=function, a=arguments: f(*a)  # type: ignore[misc] # noqa: E731
            self.partitions.append(Partition(f"partition {number}", size, run))
        threads = [threading.Thread(target=self._run, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        try:
            while not all(p.done for p in self.partitions):
                choices: list[Any] = [p for p in self.partitions if not p.done and p.ready()]
                if self.copies and not (self.late and choices):
                    choices.append("copy")
                if not choices:
                    where = "; ".join(f"{p.name} at {p.at}" for p in self.partitions if not p.done)
                    raise EmulationError(f"deadlock in program {self.index}: {where}")
                # Products take long: mostly, others go on for as long as they can.
                others = [c for c in choices if c == "copy" or c.at != PRODUCTS]
                chosen = self.rng.choice(others if others and self.rng.random() < 0.9 else choices)
                if chosen == "copy":
                    self.copies.pop(self.rng.randrange(len(self.copies)))()
                    continue
                self.current = chosen
                self.back.clear()
                chosen.go.set()
                if not self.back.wait(TIMEOUT):
                    raise EmulationError(f"{chosen.name} of program {self.index} does not come back")
                if chosen.error is not None:
                    raise chosen.error
        finally:
            self.stopped = True
            for partition in self.partitions:
                partition.go.set()
            self.current = None
        for partition in self.partitions:
            if partition.products:
                raise EmulationError(f"{partition.name} ended with products under way")
        if self.copies:
            raise EmulationError("a copy was under way when the program ended")

    def _run(self, partition: Partition) -> None:
        partition.go.wait()
        try:
            if not self.stopped:
                partition.run()
        except BaseException as error:
            partition.error = error
        finally:
            partition.done = True
            self.back.set()
