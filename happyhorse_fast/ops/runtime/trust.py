"""Self-check results, remembered per user, GPU, driver, torch, Triton and package version."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from happyhorse_fast._version import __version__
from happyhorse_fast.csrc import sources
from happyhorse_fast.files import replacing
from happyhorse_fast.kernels import launch
from happyhorse_fast.ops.runtime import self_check
from happyhorse_fast.ops.runtime.cache_folder import cache_folder
from happyhorse_fast.ops.runtime.cuda.launch import fingerprint
from happyhorse_fast.ops.runtime.self_check import KernelCheck
from happyhorse_fast.optional import version_of

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[2]
KERNELS = Path(launch.__file__).parent
JUDGED_BY = ("ops/**/*.py", "eager/*.py", "block_map/*.py", "budgets.py")
"""Files of the package, beside device code, that a verdict comes from: launchers, checks, references and budgets."""


def machine_key(backend: str, device: torch.device) -> str:
    """Digest of all that a result depends on: hardware, driver, versions, the kernels' source, launchers and checks."""
    triton = version_of("triton") or "no triton"
    parts = [backend, __version__, torch.__version__, str(torch.version.cuda), triton]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts += [properties.name, f"{properties.major}.{properties.minor}", _driver_version()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for file in sorted(file for pattern in JUDGED_BY for file in PACKAGE.glob(pattern)):
        digest.update(file.read_bytes())
    if backend == "cuda":
        for stem in sources.stems():
            digest.update(sources.digest(stem).encode())
        if device.type == "cuda":
            digest.update(fingerprint(device).encode())  # which binary runs, or which NVRTC compiles
    else:
        for file in sorted(KERNELS.rglob("*")):
            if file.suffix in (".py", ".json"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _driver_version() -> str:
    version = Path("/proc/driver/nvidia/version")
    if version.is_file():
        return version.read_text().splitlines()[0]
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # 13000: sandboxes hide /proc/driver
    return "unknown driver" if ask is None else f"driver of CUDA {ask()}"


def checked(
    backend: str, device: torch.device, wanted: Collection[tuple[str, str]]
) -> Iterator[tuple[KernelCheck, bool]]:
    """Outcomes of ops in formats that are remembered, then of those that are checked now.

    Yields:
        The outcome, which is remembered at once, so that a cut forgets nothing, and whether it was found now.
    """
    key = machine_key(backend, device)
    known = {(c.op, c.variant): c for c in recall(key) if c.fault != self_check.RAISED}
    yield from ((known[place], False) for place in wanted if place in known)
    missing = set(wanted) - known.keys()
    for check in self_check.run_checks(backend, device, fp8=True, only=missing) if missing else ():
        known[check.op, check.variant] = check
        remember(key, [found for found in known.values() if found.fault != self_check.RAISED])
        yield check, True


def recall(key: str) -> list[KernelCheck]:
    """Checks found under a key before; none where nothing was, or where it cannot be read."""
    try:
        return [KernelCheck(**check) for check in json.loads(_path(key).read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        logger.warning("remembered self-check cannot be read, kernels are checked again: %s", error)
        return []


def remember(key: str, checks: list[KernelCheck]) -> None:
    """Store what was found; a cache that cannot be written costs a check per process, and says so."""
    try:
        with replacing(_path(key)) as partial:
            partial.touch(0o600)
            partial.write_text(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    except OSError as error:
        logger.warning("self-check cannot be remembered: %s", error)


def _path(key: str) -> Path:
    return cache_folder() / f"self_check.{key}.json"
