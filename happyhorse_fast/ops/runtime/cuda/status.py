"""The parts of the CUDA path that are installed, and the code that each GPU would run; for ``doctor``."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from happyhorse_fast.block_map.from_ranges import host_module_obstacle
from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda import binaries, images, nvrtc
from happyhorse_fast.ops.runtime.cuda.errors import CudaError, cuda_version
from happyhorse_fast.ops.runtime.cuda.launch import cuda_obstacle, driver_version


def examine() -> dict[str, Any]:
    """Host module, binaries, NVRTC and driver, each with the reason where it is missing; and what would run.

    Returns:
        ``host_module``, ``binaries``, ``nvrtc`` and ``driver``: each a dict with ``found`` (None where it is missing)
        and ``why`` (None where it is found); ``targets``: what each translation unit has binaries for; ``obstacle``:
        why no CUDA kernel runs; ``code``: per GPU, the code that each translation unit would be loaded from.
    """
    why = host_module_obstacle()
    module = None if why else str(importlib.import_module("happyhorse_fast._C").__file__)
    found: dict[str, Any] = {
        "host_module": {"found": module, "why": why},
        "binaries": _asked(lambda: f"built by nvcc {binaries.manifest()['nvcc']}"),
        "nvrtc": _asked(lambda: cuda_version(nvrtc.version())),
        "driver": _asked(lambda: cuda_version(driver_version())),
        "targets": {},
        "obstacle": cuda_obstacle(torch.device("cuda")),
        "code": [],
    }
    if found["binaries"]["found"] is not None:
        built = binaries.manifest()["stems"]
        found["targets"] = {stem: list(entry["binaries"]) for stem, entry in built.items()}
    for index in range(torch.cuda.device_count() if found["driver"]["found"] else 0):
        capability, stems = torch.cuda.get_device_capability(index), {}
        for stem in sources.stems():
            try:
                stems[stem] = images.first(stem, capability, driver_version())
            except CudaError as error:
                stems[stem] = f"none: {error}"
        found["code"].append({"gpu": torch.cuda.get_device_name(index), "stems": stems})
    return found


def summary(found: dict[str, Any]) -> str:
    """A line of what :func:`examine` found: what runs, or why nothing does."""
    if found["obstacle"] is not None:
        return str(found["obstacle"])
    names = sorted({name for gpu in found["code"] for name in gpu["stems"].values()})
    return "each after its self-check, from " + ", ".join(names)


def _asked(question: Any) -> dict[str, str | None]:
    try:
        return {"found": question(), "why": None}
    except CudaError as error:
        return {"found": None, "why": str(error)}
