"""The versions of hosts that this package was tested with; docs/HOSTS.md has the same."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from happyhorse_fast.optional import said

TESTED = {
    "diffusers": "0.42.1",
    "ComfyUI": "0.3.64",
    "vllm-omni": "0.30.0",
    "kernels": "0.17.2",
}
"""Host -> version; `make check` installs the last two from these lines."""
_TOLD: set[tuple[str, str]] = set()
logger = logging.getLogger(__name__)


def tell(host: str, version: str) -> None:
    """Log once that a host is of another version than tested."""
    if version != TESTED[host] and (host, version) not in _TOLD:
        _TOLD.add((host, version))
        logger.warning("%s is %s, and happyhorse_fast was tested with %s", host, version, TESTED[host])


def interface(host: str, version: str, module: str, *names: str) -> Any:
    """A host's module, where it has the names that are used of it.

    Raises:
        ImportError: It is not where the tested version has it, or lacks one of them.
    """
    tell(host, version)
    try:
        found = importlib.import_module(module)
        for name in names:
            getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{host} {version} does not have {module} of {TESTED[host]}: {said(error)}") from error
    return found
