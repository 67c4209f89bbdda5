"""How a launcher becomes a torch.library op."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from happyhorse_fast.ops.runtime.obstacles import BackendError, triton_obstacle
from happyhorse_fast.ops.runtime.operation import NAMESPACE, A, Implementation, custom_op, flat

LAUNCHERS: dict[str, Implementation] = {}
"""The function behind every op, which takes tensors on the device "meta" as well: there the op itself is its fake."""


def kernel_op(name: str, arguments: type[A], *, kernel: object) -> Callable[[Callable[[A], Any]], Any]:
    """Decorator: a launcher as the op ``happyhorse_fast::name``, into which torch does not look while it traces.

    So a compiled model launches what an eager one does: in a trace TMA descriptors and Gluon kernels cannot stand
    (docs/decisions/0018-opaque-ops.md). Where Triton interprets ``kernel`` the interpreter is made exact: as shipped it
    gets bf16 wrong (block_sparse_attention of 150 tokens was off by a factor of 4e9).
    """
    interpreted = isinstance(kernel, InterpretedFunction)
    if interpreted:
        # Imported here: where Triton compiles, nothing of its interpreter is replaced.
        from happyhorse_fast.ops.runtime.triton.exact_interpreter import make_exact

        make_exact()
    whole = f"{NAMESPACE}::{name}"

    def refuse(*_: object, **__: object) -> Any:
        """Triton's own error is "0 active drivers ([])"."""
        raise BackendError(f"{whole} cannot run: {triton_obstacle(torch.device('cpu'))}; or pass backend='reference'")

    def decorate(launcher: Callable[[A], Any]) -> Any:
        @functools.wraps(launcher)
        def launch(given: A) -> Any:
            # Triton launches on the current device, wherever its arguments are (triton #2441).
            first = given.values()[0]
            with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
                return launcher(given)

        LAUNCHERS[whole] = flat(launch, arguments)
        op = custom_op(name, arguments)(launch)
        if not interpreted:
            op.register_kernel("cpu")(refuse)
        return op

    return decorate
