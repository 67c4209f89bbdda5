"""The versions of hosts that this package was tested with; docs/HOSTS.md has the same."""

from __future__ import annotations

import logging

TESTED = {"diffusers": "0.42.1", "ComfyUI": "0.3.64", "vllm-omni": "0.30.0", "kernels": "0.17.2"}
"""Host -> version."""
_SAID: set[tuple[str, str]] = set()


def tell(host: str, version: str) -> None:
    """Say once, by the logger ``happyhorse_fast``, that a host is of another version than tested."""
    if version != TESTED[host] and (host, version) not in _SAID:
        _SAID.add((host, version))
        logging.getLogger("happyhorse_fast").warning(
            "%s is %s, and happyhorse_fast was tested with %s", host, version, TESTED[host]
        )
