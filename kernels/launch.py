"""Launch configurations: their legality, and the committed table per architecture.

:func:`illegal` alone states which configurations are legal; the table, the tuner and the tests all go through it.
Nothing is tuned in the user's process.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

ROW_TILE = 128
"""Largest number of rows in one entry of ``row_tiles``."""
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities with a committed table: A100, RTX 30xx, RTX 40xx, H100/H200, B200, RTX 50xx."""
FP8_SINCE = 89
"""First compute capability with e4m3 tensor cores."""
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory one program may use (CUDA C++ programming guide, technical specifications table)."""
DESCRIPTORS_SINCE = 90
"""First compute capability with the tensor memory accelerator."""
HOPPER_ARCH = 90
"""Compute capability of Hopper, the one with warp-group products (wgmma)."""
HOPPER_HEAD_DIM = 128
"""Channels of the heads that QKV's kernel for Hopper has: half of its tile."""
FP_FUSION = True
"""Whether the compiler may fuse a * b + c into one rounding. Every launch passes it, because Triton 3.10 flips its
default and the compiled code must not depend on the version."""


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        block_m: Rows of the output tile.
        block_n: Columns of the output tile; keys per step in attention.
        block_k: Reduction step of a product; 0 where there is none.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        group_m: Row tiles that run side by side before the next column tile, for reuse in L2; 0 where there is none.
        descriptors: Load tiles through TMA descriptors (Hopper and later).
        hopper: Launch the warp-specialized kernel for Hopper instead, where TMA descriptors can read the tensors:
            attention's with the configuration of the entry of the same name with ``_hopper`` appended, a product's,
            whose epilogue runs beside the tensor cores, as :func:`hopper_of` says.
        reduce: Let the hardware add a product to the output in memory (TMA reduce); needs ``descriptors``.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 0
    descriptors: bool = False
    hopper: bool = False
    reduce: bool = False

    def options(self) -> dict[str, int]:
        """What a launch of Triton tells the compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": FP_FUSION}


def hopper_of(config: LaunchConfig) -> LaunchConfig:
    """Configure a product's kernel for Hopper in the order of tiles of the plain one.

    128 x 256 by 128 bytes is its one tile, 3 slots of 48 KiB and 64 KiB of sums what fits.

    Args:
        config: An entry for sm_90, which configures the plain kernel.
    """
    return replace(config, num_warps=4, num_stages=3, reduce=False)


def shared_memory_bytes(config: LaunchConfig, element_bytes: int) -> int:
    """Count the bytes of a product's software pipeline: num_stages tiles of both operands.

    Args:
        config: The configuration.
        element_bytes: Bytes per element of both operands.
    """
    return config.num_stages * (config.block_m + config.block_n) * max(config.block_k, 1) * element_bytes


def illegal(config: LaunchConfig, arch: int, *, fp8: bool, shared_bytes: int) -> str | None:
    """Return why a configuration must not be launched on an architecture, None where it may.

    Args:
        config: The configuration.
        arch: Compute capability as in :data:`ARCHITECTURES`.
        fp8: Whether the kernel multiplies e4m3 codes.
        shared_bytes: Bytes of shared memory it needs, from :func:`shared_memory_bytes` or from the compiler.
    """
    if arch not in ARCHITECTURES:
        return f"sm_{arch} has no committed table; there are {', '.join(f'sm_{a}' for a in ARCHITECTURES)}"
    if fp8 and arch < FP8_SINCE:
        return f"sm_{arch} has no e4m3 tensor cores (sm_{FP8_SINCE} and later have)"
    if config.descriptors and arch < DESCRIPTORS_SINCE:
        return f"sm_{arch} has no TMA descriptors (sm_{DESCRIPTORS_SINCE} and later have)"
    if config.reduce and not config.descriptors:
        return "reduce goes through TMA descriptors, and descriptors is False"
    if config.hopper and arch != HOPPER_ARCH:
        return f"sm_{arch} has no warp-group products (sm_{HOPPER_ARCH} alone has)"
    for name in ("block_m", "block_n", "block_k", "num_warps"):
        value = getattr(config, name)
        if value & (value - 1) or (value == 0 and name != "block_k"):
            return f"{name} must be a power of two, got {value}"
    if config.block_m > ROW_TILE:
        return f"block_m must be at most {ROW_TILE} (a row tile never crosses an expert), got {config.block_m}"
    if shared_bytes > SHARED_MEMORY[arch]:
        return f"needs {shared_bytes} bytes of shared memory, sm_{arch} has {SHARED_MEMORY[arch]}"
    return None


@functools.cache
def table(stem: str) -> dict[str, dict[str, dict[str, object]]]:
    """Read a stem's committed configurations, {variant: {"90": {field: value}}}, once per process."""
    data = Path(__file__).parent / "configs" / f"{stem}.json"
    loaded: dict[str, dict[str, dict[str, object]]] = json.loads(data.read_text())
    return loaded


_PASSED: ContextVar[Mapping[tuple[str, str, int], LaunchConfig]] = ContextVar("passed", default=MappingProxyType({}))


@contextlib.contextmanager
def launched_with(stem: str, configs: Mapping[tuple[str, int], LaunchConfig]) -> Iterator[None]:
    """Replace table entries for the launches made inside, by this thread. The committed table is not changed.

    Args:
        stem: File stem of the kernel.
        configs: Configuration by (variant, architecture), in place of the table's entry. Nested calls add up.
    """
    entered = _PASSED.set({**_PASSED.get(), **{(stem, *entry): config for entry, config in configs.items()}})
    try:
        yield
    finally:
        _PASSED.reset(entered)


def config_for(stem: str, variant: str, arch: int) -> LaunchConfig:
    """Return the configuration of a kernel: that of :func:`launched_with` where there is one, else the committed one.

    Args:
        stem: File stem of the kernel.
        variant: Its dtype and epilogue, as the stem's table names them.
        arch: Compute capability; an unlisted one takes the nearest lower one.

    Raises:
        LookupError: There is no such variant, or no configuration of it at or below ``arch``.
    """
    variants = table(stem)
    if variant not in variants:
        raise LookupError(f"{stem} has no variant {variant!r}; there are {', '.join(sorted(variants))}")
    candidates = [int(a) for a in variants[variant] if int(a) <= arch]
    if not candidates:
        raise LookupError(
            f"{stem} {variant!r} has no configuration for sm_{arch}; there are {sorted(variants[variant])}"
        )
    nearest = max(candidates)
    passed = _PASSED.get().get((stem, variant, nearest))
    return passed or LaunchConfig(**variants[variant][str(nearest)])  # type: ignore[arg-type]
