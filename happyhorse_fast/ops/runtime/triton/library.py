"""How a launcher becomes a torch.library op."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.library import wrap_triton
from triton.runtime.interpreter import InterpretedFunction

LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""The function behind every op, which takes tensors on the device "meta" as well: there the op itself is its fake."""


def kernel_op(name: str, *, kernel: object, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `triton_op` where Triton compiles ``kernel``, so that torch.compile sees the launch in it.

    Under TRITON_INTERPRET=1 a launch needs addresses and cannot be traced (torch 2.13: "Attempted to access the data
    pointer on an invalid python storage"), so the op is an opaque `custom_op` there. The interpreter is made exact: as
    shipped it gets bf16 wrong (block_sparse_attention of 150 tokens was off by a factor of 4e9).
    """
    if isinstance(kernel, InterpretedFunction):
        # Imported here: where Triton compiles, nothing of its interpreter is replaced.
        from happyhorse_fast.ops.runtime.triton.exact_interpreter import make_exact

        make_exact()

    def refuse(*_: object, **__: object) -> Any:
        """Triton's own error is "0 active drivers ([])"."""
        from happyhorse_fast.ops.runtime.dispatch import BackendError, triton_obstacle

        raise BackendError(f"{name} cannot run: {triton_obstacle(torch.device('cpu'))}; or pass backend='reference'")

    def decorate(function: Callable[..., Any]) -> Any:
        LAUNCHERS[name] = function
        op = register(name, mutates_args=mutates_args)(function)
        if not isinstance(kernel, InterpretedFunction):
            op.register_kernel("cpu")(refuse)
        return op

    register = torch.library.custom_op if isinstance(kernel, InterpretedFunction) else torch.library.triton_op
    return decorate


def launchable(kernel: Any) -> Any:
    """A kernel as an op's body launches it: `wrap_triton` where it is compiled, so that a trace sees the launch.

    Interpreted it is itself: there no trace looks inside the op, and torch 2.11's `wrap_triton` refuses it.
    """
    return kernel if isinstance(kernel, InterpretedFunction) else wrap_triton(kernel)
