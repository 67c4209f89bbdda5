"""torch's process-wide and per-thread settings, held at their defaults where results must not depend on them.

A reference, an oracle, a self-check and the float32 ends of a model mean the same whatever the caller has set: TF32 or
bf16 for float32 products (4e-7 becomes 5e-3), another default device or dtype, autocast, a choice of attention kernels.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_C: Any = torch._C


@dataclass(frozen=True)
class _Setting:
    """A setting of the whole process: how to read and write it, and what it is held at."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    held: Any

    def hold(self, value: Any) -> bool:
        """Write what it is held at over ``value``; whether that changed it."""
        if value == self.held:
            return False
        self.set(self.held)
        return True


class _Float32(_Setting):
    """What float32 may be rounded to in an operation: one setting by its old name, and one per backend and kind.

    A value is (the old one, None where torch refuses to name it because the new ones contradict it; the new ones).
    """

    EXACT = ("none", "ieee")

    def __init__(self, name: str, exact: Any, *kinds: tuple[str, str]) -> None:
        super().__init__(self.read, self.write, None)
        self.get_old, self.set_old = getattr(_C, f"_get_{name}"), getattr(_C, f"_set_{name}")
        self.exact, self.kinds = exact, kinds

    def read(self) -> tuple[Any, tuple[str, ...]]:
        kinds = tuple(_C._get_fp32_precision_getter(*kind) for kind in self.kinds)
        try:
            return self.get_old(), kinds
        except RuntimeError:
            return None, kinds

    def write(self, value: tuple[Any, tuple[str, ...]]) -> None:
        old, kinds = value
        if old is not None:
            self.set_old(old)
        for (backend, kind), precision in zip(self.kinds, kinds, strict=True):
            if _C._get_fp32_precision_getter(backend, kind) == precision:
                continue
            # Reading resolves "none": what equals the setting above was most likely inherited, and goes on to be.
            above = precision != "ieee" and precision == _C._get_fp32_precision_getter(backend, "all")
            _C._set_fp32_precision_setter(backend, kind, "none" if above else precision)

    def hold(self, value: tuple[Any, tuple[str, ...]]) -> bool:
        old, kinds = value
        if all(precision in self.EXACT for precision in kinds):
            return False
        # By the old name where torch knows it, or reading that raises in other threads.
        self.write((None if old is None else self.exact, tuple("ieee" for _ in kinds)))
        return True


def _bf16_sums() -> tuple[bool, ...]:
    """Whether bf16 products may round partial sums to bf16, and newer torch: whether they may split K."""
    allowed = _C._get_cublas_allow_bf16_reduced_precision_reduction()
    return allowed if isinstance(allowed, tuple) else (allowed,)


SETTINGS = (
    _Float32("float32_matmul_precision", "highest", ("cuda", "matmul"), ("mkldnn", "matmul"), ("mkldnn", "conv")),
    # cuDNN may round convolutions to TF32, as torch lets it by default.
    _Float32("cudnn_allow_tf32", False, ("cuda", "conv")),
    # Of a transposed convolution cuDNN may take an algorithm whose sums are in another order in every run.
    _Setting(_C._get_cudnn_deterministic, _C._set_cudnn_deterministic, True),
    # Tries algorithms out in the first call of every shape, and takes another one in another process.
    _Setting(_C._get_cudnn_benchmark, _C._set_cudnn_benchmark, False),
    # Partial sums of bf16 products as torch has them by default, which is how the published numbers were made.
    _Setting(
        _bf16_sums,
        lambda value: _C._set_cublas_allow_bf16_reduced_precision_reduction(*value),
        (True,) * len(_bf16_sums()),
    ),
    *(
        _Setting(getattr(_C, f"_get_{kind}_sdp_enabled"), getattr(_C, f"_set_sdp_use_{kind}"), True)
        for kind in ("flash", "mem_efficient", "cudnn", "math")  # kernels of attention
    ),
    _Setting(_C._get_math_sdp_allow_fp16_bf16_reduction, _C._set_math_sdp_allow_fp16_bf16_reduction, False),
    _Setting(_C._get_mkldnn_enabled, _C._set_mkldnn_enabled, True),
    _Setting(torch.get_default_dtype, _C._set_default_dtype, torch.float32),
)
"""Settings that no thread has for itself."""


class _Held:
    """Holds :data:`SETTINGS` while anybody asks for it: the first to enter writes, the last to leave restores.

    Threads share the settings, so one that leaves must not take them from another; a caller's own change in between
    stays.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._changed: dict[_Setting, tuple[Any, Any]] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            for setting in SETTINGS:
                before = setting.get()
                if setting.hold(before):
                    self._changed[setting] = before, setting.get()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            for setting, (before, held) in self._changed.items():
                if setting.get() == held:
                    setting.set(before)
            self._changed.clear()


_HELD = _Held()
_THREAD = threading.local()
_AUTOCAST_KINDS = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps")))


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold torch's settings at their defaults and float32 products at float32, on any device; no autocast.

    What a thread has for itself (autocast, the default device) changes in this thread alone. What the process shares
    is restored once no thread needs it any more; a value set by another thread in the meantime counts from then on.
    Costs 20 us; nothing inside another one.
    """
    if getattr(_THREAD, "inside", False):
        yield
        return
    _THREAD.inside = True
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_HELD)
            for kind in _AUTOCAST_KINDS if _C._is_any_autocast_enabled() else ():
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            # A mode costs every call of torch a microsecond, so only where there is something to undo.
            if _C._len_torch_function_stack() or _C._get_default_device() != "cpu":
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        _THREAD.inside = False


def independent(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs under :func:`held`.

    Not while torch compiles or exports: a setting cannot be written in a graph. What has to be exact there is an op of
    its own, whose body runs later, such as :func:`happyhorse_fast.eager.float32.linear`.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with held():
            return function(*args, **kwargs)

    # torch.library reads types off a signature, and looks their names up here, where they are not known. What only a
    # type checker imports stays text.
    with contextlib.suppress(NameError):
        run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return run


def makes_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """As :func:`independent`, and without inference mode, whose tensors cannot be trained or written to afterwards.

    For what makes models, packs them, or keeps tensors for later calls.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return independent(run)
