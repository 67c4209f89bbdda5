"""Processes that ``torchrun`` started: which one this is, its device, and the mesh of all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Launched:
    """One of several processes of a run.

    Attributes:
        rank: Among all of them.
        local_rank: Among those of this machine.
        size: All of them.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Launched:
        """As ``torchrun`` says in the environment; alone where it does not.

        Raises:
            ValueError: A variable of ``torchrun``'s holds no number, or ``RANK`` is missing.
        """
        found = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        if found["WORLD_SIZE"] is None:
            return cls()
        try:
            return cls(*(int(value or "") for value in found.values()))
        except ValueError:
            said = ", ".join(f"{name}={value}" for name, value in found.items())
            raise ValueError(f"torchrun's variables must be numbers, got {said}") from None

    def device(self, name: str) -> str:
        """This process's device of a kind, ``"cuda"`` or ``"cpu"``.

        Raises:
            ValueError: Several processes and one device, such as ``"cuda:1"``.
        """
        if self.size == 1 or name == "cpu":
            return name
        if name != "cuda":
            raise ValueError(
                f"device must be auto, cuda or cpu where torchrun starts {self.size} processes, got {name}"
            )
        return f"cuda:{self.local_rank}"

    @contextmanager
    def mesh(self, device: str) -> Iterator[DeviceMesh | None]:
        """The mesh of all processes, on nccl or gloo, inside the context; None for one process.

        A process group that is there already is used, and left.
        """
        if self.size == 1:
            yield None
            return
        import torch  # here: the command line asks before it loads anything heavy
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        kind, ours = torch.device(device).type, not dist.is_initialized()
        if kind == "cuda":
            torch.cuda.set_device(device)
        if ours:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        try:
            yield init_device_mesh(kind, (self.size,))
        except BaseException:
            if ours and kind == "cuda":
                # NCCL's shutdown waits for what is on its way, which may be from a rank that is gone.
                dist.distributed_c10d._abort_process_group()
            raise
        finally:
            if ours and dist.is_initialized():
                dist.destroy_process_group()
