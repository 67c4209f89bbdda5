"""Around torch's compiler and tracers: the module inside a compiled one, and real tensors whoever traces the call."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

_ATTRIBUTE = "_orig_mod"


def unwrapped(model: Any) -> Any:
    """The module that ``torch.compile(model)`` wraps; anything else as it is."""
    while isinstance(model, nn.Module) and isinstance(inner := model._modules.get(_ATTRIBUTE), nn.Module):
        model = inner
    return model


def published_key(key: str) -> str:
    """A state-dict key without the names of wrappers, wherever they stand: ``_orig_mod.block.layers.0...``."""
    return ".".join(part for part in key.split(".") if part != _ATTRIBUTE)


def state_dict_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict under published keys, though it or a part of it is compiled."""
    return {published_key(key): value for key, value in module.state_dict().items()}


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
