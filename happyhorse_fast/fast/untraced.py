"""Leave every tracer, so that tensors kept for later calls are real ones, whoever calls now."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def untraced() -> Iterator[None]:
    """Leave fake, proxy and functional tensors, torch.func's transforms, torch.jit.trace and inference mode.

    Operations inside run for real and unrecorded, and make ordinary tensors without gradients, which any later call can
    use: one of inference mode may not go into a graph of autograd's.
    """
    jit: Any = torch._C
    recording = jit._get_tracing_state()
    with ExitStack() as stack:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # it loads Triton

            stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if recording is not None:
            jit._set_tracing_state(None)
        try:
            yield
        finally:
            if recording is not None:
                jit._set_tracing_state(recording)


def load_compiler() -> None:
    """Import torch's compiler, which the first call of an op of this package would do, without a trace.

    The import leaves a cycle of frames behind (torch.fx.wrap, torch 2.13), and frames hold those that called them: a
    model in one of their variables would live until a garbage collection, 14 GiB of it.
    """
    if "torch._dynamo" not in sys.modules:
        importlib.import_module("torch._dynamo")
        gc.collect()
