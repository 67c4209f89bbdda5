"""CUDA errors that end a process's use of the GPU, such as an illegal address: every later call fails with it.

What was measured before must be written, what comes after must not be blamed: a command stops there with :data:`LOST`,
and may be started again for the rest.
"""

from __future__ import annotations

import torch

LOST = 3
"""Exit code of a command that stopped at such an error."""


def lost(device: torch.device) -> str | None:
    """Say what ended the use of a device; None where it works."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None
