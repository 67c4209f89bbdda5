"""Why a backend cannot run on a device."""

from __future__ import annotations

import torch

from happyhorse_fast import optional


class BackendError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why."""


def lost(device: torch.device) -> str | None:
    """Say what ended this process's use of a GPU, such as an illegal address; None where it works, or there is none.

    Every later call fails with the same error: what was found before stays, what comes after must not be blamed.
    """
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run for tensors on ``device``; None where they can.

    On the CPU they run in Triton's interpreter only, which is for tests: about 10 s a layer at 1,750 tokens.
    """
    why_not = triton_missing()
    if why_not is not None or device.type == "cuda":
        return why_not
    from triton.runtime.interpreter import InterpretedFunction

    from happyhorse_fast.kernels import numerics

    if isinstance(numerics.to_e4m3, InterpretedFunction):
        return None
    return f"Triton kernels need a GPU, the model is on {device} (TRITON_INTERPRET=1 runs them slowly on the CPU)"


def triton_missing() -> str | None:
    """Why Triton cannot be used on any device; None where it imports, and kernels can be defined with it."""
    optional.hide_broken_triton()
    why_not = optional.obstacle("triton")
    if why_not is not None:
        return why_not.replace("triton", "Triton", 1)
    try:
        from happyhorse_fast.kernels import numerics  # noqa: F401
    except Exception as error:  # of a version that the kernels are not for, or in parts
        return f"Triton is installed but its kernels do not import: {optional.said(error)}"
    return None
